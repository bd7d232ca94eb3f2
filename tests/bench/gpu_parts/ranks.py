"""Starts the ranks of a part, each a process, and gathers the JSON object that each prints last."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from noflush.demo.port import held_port
from tests.bench.gpu_parts import machine
from tests.bench.gpu_parts.printed import last_object
from tests.bench.gpu_parts.table import ENDS
from tests.bench.gpu_parts.ways import Gpus, environment, way_of

_AFTER_A_FAILURE = 5.0
"""Seconds that the others get, once a rank has failed, to fail by themselves and say why."""


_TO_TELL = 3.0
"""Seconds that a part keeps to say what its ranks did, before it is killed itself."""


def seconds_left():
    """Until this part is killed; a minute where nobody does."""
    return float(os.environ.get(ENDS, time.time() + 60.0)) - time.time()


class RanksError(RuntimeError):
    """Ranks failed or did not end; says what they wrote last."""


def gpus():
    """What this machine has."""
    if not torch.cuda.is_available():
        return Gpus(0)
    return Gpus(torch.cuda.device_count(), tuple(machine.partitions()), machine.nccl_version())


class Ranks:
    """``world`` processes of ``module``, started at once; `gather` waits for them.

    Args:
        way: of `ways`; None takes the nearest there is.
        limit: seconds until they are killed; None: just before this part would be.
    """

    def __init__(self, module, world, arguments, limit=None, way=None):
        found = gpus()
        limit = seconds_left() - _TO_TELL if limit is None else limit
        self.way = way or way_of(world, found)
        self._deadline = time.monotonic() + limit
        self._limit = limit
        self._stack = contextlib.ExitStack()
        port = self._stack.enter_context(held_port())
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._processes = []
        for rank in range(world):
            env = os.environ | environment(self.way, rank, found.partitions)
            env |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with open(self._folder / f"{rank}.out", "w") as out, open(self._folder / f"{rank}.err", "w") as err:
                command = [sys.executable, "-m", module, *arguments, "--as-rank"]
                self._processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=err))

    def gather(self):
        """Each rank's object, in their order. Raises RanksError, with what the first one to fail has said."""
        with self._stack:
            first = None
            try:
                while None in (codes := [process.poll() for process in self._processes]):
                    failed = [rank for rank, code in enumerate(codes) if code]
                    if first is None and failed:
                        first = failed[0]
                        self._deadline = min(self._deadline, time.monotonic() + _AFTER_A_FAILURE)
                    if time.monotonic() > self._deadline:
                        break
                    time.sleep(0.05)
            finally:
                for process in self._processes:
                    process.kill()
                    process.wait()
            if any(codes) or None in codes:
                raise RanksError(self._story(codes, first))
            return [last_object(self._read(rank, "out")) for rank in range(len(codes))]

    def _read(self, rank, kind):
        return (self._folder / f"{rank}.{kind}").read_text(errors="replace")

    def _story(self, codes, first):
        late = [rank for rank, code in enumerate(codes) if code is None]
        failed = [rank for rank, code in enumerate(codes) if code]
        rank = first if first is not None else (failed or late)[0]
        said = (self._read(rank, "out") + self._read(rank, "err")).splitlines()[-10:]
        ended = f"ranks {failed} failed" if failed else f"no rank failed in {self._limit:.0f} s"
        return "\n".join([f"by way {self.way!r}: {ended}, {late} did not end; rank {rank} wrote last:", *said])


def own_device():
    """This rank's device, made the current one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def join(device, seconds):
    """Joins the other ranks, as DeepSpeed does: over NCCL bound to ``device``, or over gloo on a CPU."""
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timedelta(seconds=seconds), device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
