"""Starts the ranks of a slice, by itself or by srun, and waits for them; told to stop, they save and end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from noflush.demo.port import held_port
from noflush.launch.ranks import uses_cuda
from tests.bench.gpu_parts import ranks, ways
from tests.bench.paper_parts.folders import log_name
from tests.bench.paper_parts.room import device_of

ROOT = Path(__file__).parents[3]
_LAUNCHER = "noflush.launch.pretrain_gpt"
_TO_SAVE = 180.0
"""Seconds that ranks get to save once they are told to stop."""
_TO_FOLLOW = 90.0
"""And to end by themselves once one has failed: they say why."""
_OF_OTHER_RUNS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Stop:
    """Hears Ctrl-C, SIGTERM and SIGUSR1 (SLURM's warning), the first of which is kept; the second ends at once."""

    def __init__(self):
        self.first, self.count = None, 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hear)

    def _hear(self, number, frame):
        self.count += 1
        self.first = self.first or signal.Signals(number).name


def own_job(environ):
    """This job's number for scontrol. One task of an array has the array's own, by which SLURM means all of them."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ["SLURM_JOB_ID"]


class Place:
    """Where ``stages`` ranks run: tasks of this SLURM job, GPUs of this machine, or its CPUs.

    Raises ValueError for a SLURM job of another number of tasks.
    """

    def __init__(self, stages, environ):
        self.stages = stages
        tasks = int(environ.get("SLURM_NTASKS", 1)) if "SLURM_JOB_ID" in environ else 1
        self.slurm = tasks > 1
        if self.slurm and tasks != stages:
            raise ValueError(
                f"this SLURM job has {tasks} tasks, and there are {stages} stages: ask for --nodes and "
                f"--ntasks-per-node whose product is {stages}"
            )
        self.gpus = ways.Gpus(0) if self.slurm or not uses_cuda(environ) else ranks.gpus()
        self.way = "srun" if self.slurm else ways.way_of(stages, self.gpus)

    def __str__(self):
        if self.slurm:
            return f"{self.stages} tasks of SLURM job {os.environ['SLURM_JOB_ID']}"
        if self.way == "gloo":
            return f"{self.stages} ranks on this machine's CPUs, by gloo"
        if self.way == "devices":
            return f"{self.stages} ranks, a GPU each"
        if self.way == "partitions":
            return f"{self.stages} ranks, a MIG partition each: losses are right, times are not those of 8 GPUs"
        gpus = f"{self.gpus.devices} GPU" + "s" * (self.gpus.devices > 1)
        return f"{self.stages} ranks share {gpus} (way: {self.way}): losses are right, times are not those of 8 GPUs"

    def environment(self, rank, port):
        """Of one of this machine's ranks."""
        env = {name: value for name, value in os.environ.items() if name not in _OF_OTHER_RUNS}
        env |= ways.environment(self.way, rank, self.gpus.partitions)
        if self.way in ("multi-rank", "host id"):
            env["LOCAL_RANK"] = str(device_of(self.way, rank, self.stages, self.gpus.devices))
        elif self.way == "gloo":
            env["LOCAL_RANK"] = str(rank)
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.stages)))
        if self.way != "gloo":
            env.pop("TRITON_INTERPRET", None)
        env |= {"RANK": str(rank), "WORLD_SIZE": str(self.stages), "LOCAL_WORLD_SIZE": str(self.stages)}
        return env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run_slice(place, words, folder, number, stop, tell):
    """One slice of ``words``, its logs in ``folder``; the exit statuses of its processes.

    ``tell``: is called every second or so.
    """
    with held_port() as port:
        processes = _started(place, words, folder, number, port)
        try:
            return _waited(processes, stop, tell)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _started(place, words, folder, number, port):
    # In sessions of their own: the terminal's Ctrl-C is for this process, which tells them to save.
    how = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
    if place.slurm:
        env = {name: value for name, value in os.environ.items() if name not in _OF_OTHER_RUNS}
        if "SLURM_CPUS_PER_TASK" in env:  # srun 22.05 and newer no longer take it from sbatch
            env.setdefault("SRUN_CPUS_PER_TASK", env["SLURM_CPUS_PER_TASK"])
            env.setdefault("OMP_NUM_THREADS", env["SLURM_CPUS_PER_TASK"])
        command = ["srun", "--kill-on-bad-exit=1", f"--output={folder / log_name(number, '%t')}"]
        command += [sys.executable, "-u", "-m", _LAUNCHER, *words]
        with open(folder / log_name(number, "srun"), "w") as out:
            return [subprocess.Popen(command, env=env, stdout=out, **how)]
    processes = []
    for rank in range(place.stages):
        command = [sys.executable, "-u", "-m", "tests.bench.paper_parts.rank", *words]
        with open(folder / log_name(number, rank), "w") as out:
            processes.append(subprocess.Popen(command, env=place.environment(rank, port), stdout=out, **how))
    return processes


def _waited(processes, stop, tell):
    told, deadline = 0, None
    while None in (codes := [process.poll() for process in processes]):
        if stop.count > told:
            told = stop.count
            # To srun, which passes it on; the launcher takes it as well as SIGTERM.
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGUSR1 if told == 1 else signal.SIGKILL)
            deadline = time.monotonic() + _TO_SAVE
        if deadline is None and any(codes):
            deadline = time.monotonic() + _TO_FOLLOW
        if deadline is not None and time.monotonic() > deadline:
            break
        tell()
        time.sleep(0.2)
    return [process.poll() for process in processes]
