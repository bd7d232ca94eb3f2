"""A real SLURM cluster on this machine: slurmctld, and a slurmd for each node in a "machine" of its own.

A node is a set of namespaces: its own processes, network address and host name. So a rendezvous that says localhost
fails here as it would on a cluster, and a node can lose its power.

    sandbox   pid, mount, net and uts namespaces: munged, slurmctld, the bridge, /etc/hosts
      node1   pid, mount, net and uts namespaces in the sandbox: slurmd, its slurmstepd, their tasks
      node2   ...

Everything ends with the sandbox's first process, which ends when its standard input does: with `Cluster.close`, with
the Python process that made the cluster however that dies, or after ``life`` seconds.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

NETWORK = "10.77.0"
HEAD = f"{NETWORK}.254"
NAMESPACES = ["--pid", "--mount", "--net", "--uts"]
OWN = ["unshare", "--fork", "--kill-child", "--mount-proc", *NAMESPACES]
PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter")

CONFIG = """\
ClusterName=test
SlurmctldHost=head({head})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=0
SlurmdTimeout={slurmd_timeout}
MessageTimeout=10
KillWait=2
MinJobAge=3600
NodeName=node[1-{nodes}] NodeAddr={network}.[1-{nodes}] CPUs=2 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class ClusterError(AssertionError):
    """A command failed or something did not happen in time; carries what SLURM says and the ends of the logs."""


def why_not_here() -> str | None:
    """Why no sandbox can be made on this machine; None where it can."""
    if os.geteuid() != 0:
        return "only root may make the namespaces that a node is made of"
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        return "no unshare and nsenter (util-linux) on this machine"
    done = subprocess.run([*OWN, "true"], capture_output=True, text=True, timeout=20)
    return f"no namespaces on this machine: {done.stderr.strip()}" if done.returncode else None


class Cluster:
    """``nodes`` nodes named node1, node2, ... of two CPUs each; a context manager.

    Args:
        folder: where configuration, state and logs go. It must not exist twice at a time.
        nodes: how many.
        slurmd_timeout: seconds of silence after which SLURM declares a node down.
        life: seconds after which the whole cluster ends, whatever happens.
    """

    def __init__(self, folder: Path, nodes: int, slurmd_timeout: int = 15, life: float = 600) -> None:
        self.folder = folder
        self.names = [f"node{k}" for k in range(1, nodes + 1)]
        self._slurmd_timeout = slurmd_timeout
        self._life = life
        self._sandbox: subprocess.Popen[bytes] | None = None
        self._init = 0  # the sandbox's first process, as this side numbers it
        self._nodes: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._jobs: dict[int | str, Path] = {}  # job, or task of an array (12_0) -> its batch script's output

    # ---- life --------------------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        missing = [p for p in PROGRAMS if not shutil.which(p)]
        if missing:
            raise ClusterError(f"{', '.join(missing)} not found; run tests/slurm/install.sh (as root)")
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "state").mkdir()
        for name in self.names:
            (self.folder / "spool" / name).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                folder=self.folder,
                head=HEAD,
                network=NETWORK,
                nodes=len(self.names),
                slurmd_timeout=self._slurmd_timeout,
            )
        )
        # For SLURM to count and to hand out by number; it wants devices, and nothing opens them.
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        addresses = {f"{NETWORK}.{k}": name for k, name in enumerate(self.names, 1)}
        hosts = {"127.0.0.1": "localhost", HEAD: "head", **addresses}
        (self.folder / "hosts").write_text("".join(f"{a} {name}\n" for a, name in hosts.items()))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

        self._sandbox = subprocess.Popen(
            [*OWN, "bash", "-c", 'echo; read -rt "$1"', "sandbox", str(self._life)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._init = _first_process(self._sandbox)
        self._shell(
            f"""hostname head
            mount --bind {self.folder}/hosts /etc/hosts
            ip link set lo up
            ip link add br0 type bridge
            ip link set br0 up
            ip addr add {HEAD}/24 dev br0"""
        )
        munged = ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket"]
        munged += [f"--{what}-file={self.folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
        self.daemon("munged", munged)
        self.wait_for((self.folder / "munge.socket").exists, 10, "munged's socket")
        self.daemon("slurmctld", ["slurmctld", "-D"])
        for name in self.names:
            self._power_on(name)
        self.wait_for(lambda: self.node_states() == dict.fromkeys(self.names, "idle"), 30, "every node idle")

    def close(self) -> None:
        """Ends every process of the cluster, and returns when they are gone."""
        if self._sandbox is None:
            return
        if self._sandbox.stdin:
            self._sandbox.stdin.close()
        try:
            self._sandbox.wait(5)
        except subprocess.TimeoutExpired:
            self._sandbox.kill()  # --kill-child: its child, the sandbox's first process, goes with it
            self._sandbox.wait(5)
        if self._sandbox.stdout:
            self._sandbox.stdout.close()
        self._sandbox = None
        for process in [*self._daemons, *(node for node, _ in self._nodes.values())]:
            process.wait(10)  # the kernel has killed what is in the sandbox
            if process.stdin:
                process.stdin.close()
            if process.stdout:
                process.stdout.close()

    def _inside(self) -> list[str]:
        return ["nsenter", f"--target={self._init}", *NAMESPACES, "env", "-C", str(self.folder)]

    def _environment(self, more: Mapping[str, str] = {}) -> dict[str, str]:
        # Not what this process itself got from a SLURM or a launcher.
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return {**mine, "SLURM_CONF": str(self.folder / "slurm.conf"), **more}

    def daemon(self, name: str, words: Sequence[str]) -> None:
        """Starts a program on the head node, which ends with the cluster; its output: ``name``.out in the folder."""
        with (self.folder / f"{name}.out").open("wb") as out:
            self._daemons.append(
                subprocess.Popen(
                    [*self._inside(), *words],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=self._environment(),
                )
            )

    def _shell(self, script: str) -> None:
        self.run(["sh", "-ec", script])

    # ---- nodes -------------------------------------------------------------------------------------------

    def _power_on(self, name: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            # slurmd waits (read) until its network is there. Its shell stays: a first process reaps orphans.
            script = 'hostname "$1"; echo; read -r go; slurmd -D -N "$1" </dev/null >&2; exit'
            node = subprocess.Popen(
                [*self._inside(), *OWN, "sh", "-c", script, "node", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                env=self._environment(),
            )
        first = _first_process(node)
        self._nodes[name] = (node, first)
        number = self.names.index(name) + 1
        # nsenter without --pid: `ip` must know the node's first process by the number it has on this side.
        wires = f"""nsenter --target={self._init} --net -- ip link add {name} type veth peer name eth0 netns {first}
            nsenter --target={self._init} --net -- ip link set {name} master br0 up
            nsenter --target={first} --net -- ip link set lo up
            nsenter --target={first} --net -- ip addr add {NETWORK}.{number}/24 dev eth0
            nsenter --target={first} --net -- ip link set eth0 up"""
        done = subprocess.run(["sh", "-ec", wires], capture_output=True, text=True, timeout=20)
        if done.returncode:
            raise ClusterError(f"no network for {name}: {done.stderr}")
        assert node.stdin
        node.stdin.write(b"go\n")
        node.stdin.flush()

    def kill_node(self, name: str) -> None:
        """A power cut: nothing more comes from the node, not even the end of a connection, and all of it is gone."""
        node, first = self._nodes[name]
        self._shell(f"ip link set {name} down")
        os.kill(first, signal.SIGKILL)  # a pid namespace ends with its first process
        node.wait(10)
        self._shell(f"ip link del {name} 2>/dev/null || true")

    def bring_back(self, name: str) -> None:
        """Starts a killed node again, empty; SLURM takes it back when it registers."""
        self._power_on(name)
        self.wait_for(lambda: self.node_states()[name] == "idle", 30, f"{name} idle")

    def mark_down(self, name: str) -> None:
        """What an operator does who will not wait for SLURM to notice."""
        self.run(["scontrol", "update", f"nodename={name}", "state=down", "reason=test"])

    def node_states(self) -> dict[str, str]:
        """Node -> state as `sinfo` has it; a ``*`` behind it: the node does not answer."""
        lines = self.run(["sinfo", "-h", "-N", "-o", "%N %T"], check=False).splitlines()
        return dict(line.split() for line in lines)

    def tasks(self, name: str, script: str) -> list[psutil.Process]:
        """Processes on the node that run the Python script ``script``."""
        found = []
        for process in psutil.Process(self._nodes[name][1]).children(recursive=True):
            try:
                words = process.cmdline()
                if "python" in words[0] and any(word.endswith(script) for word in words[1:]):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
                continue
        return found

    # ---- commands and jobs -------------------------------------------------------------------------------

    def run(self, words: Sequence[str], timeout: float = 30, check: bool = True) -> str:
        """Output of a command on the head node, such as ``["squeue"]``."""
        done = subprocess.run(
            [*self._inside(), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            env=self._environment(),
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(words)} ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def sbatch(
        self,
        script: Path,
        *arguments: str,
        options: Sequence[str] = (),
        environment: Mapping[str, str] = {},
        folder: Path,
    ) -> int:
        """Submits ``script arguments...`` from ``folder``; returns the job's number."""
        words = ["env", "-C", str(folder), "sbatch", "--parsable", *options, str(script), *arguments]
        done = subprocess.run(
            [*self._inside(), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            env=self._environment(environment),
        )
        if done.returncode:
            raise ClusterError(f"{' '.join(words)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        job = int(done.stdout)
        self._jobs[job] = Path(self.job(job)["StdOut"])
        return job

    def sbatch_array(self, tasks: int, script: Path, *arguments: str, **more: Any) -> list[str]:
        """The same as an array of ``tasks`` tasks; returns their names, such as 12_0."""
        options = [f"--array=0-{tasks - 1}", *more.pop("options", ())]
        job = self.sbatch(script, *arguments, options=options, **more)
        del self._jobs[job]
        names = [f"{job}_{number}" for number in range(tasks)]
        self._jobs |= {name: Path(self.job(name)["StdOut"]) for name in names}
        return names

    def job(self, job: int | str) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, Restarts, NodeList, ExitCode, Reason, ..."""
        words = self.run(["scontrol", "-o", "show", "job", str(job)]).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: int | str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.job(job)["JobState"]

    def output(self, job: int | str) -> str:
        """What the batch script itself has said so far."""
        return self._jobs[job].read_text(errors="replace") if self._jobs[job].exists() else ""

    def requeue_now(self, job: int | str) -> None:
        """Lets a requeued job start in two seconds: SLURM holds it back for two minutes.

        Not at once: nodes refuse a job in the very second in which they have ended it ("Job credential revoked").
        """
        self.run(["scontrol", "update", f"jobid={job}", "StartTime=now+2seconds"])

    # ---- waiting -----------------------------------------------------------------------------------------

    def wait_for(self, predicate: Callable[[], object], timeout: float, what: str) -> float:
        """Waits until ``predicate`` holds; returns how many seconds that took."""
        start = time.monotonic()
        while not predicate():
            if time.monotonic() - start > timeout:
                raise ClusterError(f"not within {timeout:g} s: {what}\n{self.report()}")
            time.sleep(0.1)
        return time.monotonic() - start

    def wait_for_end(self, job: int | str, timeout: float) -> str:
        """The state that ``job`` ends with."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
        self.wait_for(lambda: self.state(job) in ended, timeout, f"job {job} at its end")
        return self.state(job)

    def report(self) -> str:
        """For a failure's message: nodes, queue, and the end of every log."""
        parts = [self.run(["sinfo", "-N", "-l"], check=False), self.run(["squeue", "-l", "-t", "all"], check=False)]
        logs = [*self._jobs.values(), *self.folder.glob("*.log"), *self.folder.glob("*.out")]
        logs += [log for out in set(self._jobs.values()) for log in out.parent.glob("**/*.log")]
        for log in dict.fromkeys(logs):
            if log.exists() and log.stat().st_size:
                parts.append(f"--- {log}\n{log.read_text(errors='replace')[-1500:]}")
        return "\n".join(parts)


def _first_process(parent: subprocess.Popen[bytes]) -> int:
    """The first process of the innermost pid namespace that ``parent`` makes, as this side numbers it.

    Its shell has printed a line when everything that is asked of unshare and nsenter is done.
    """
    assert parent.stdout
    if not parent.stdout.readline():
        raise ClusterError(f"{parent.args!r} ended with {parent.wait(10)}")
    process = psutil.Process(parent.pid)
    while process.name() not in ("bash", "sh"):
        (process,) = process.children()
    return int(process.pid)
