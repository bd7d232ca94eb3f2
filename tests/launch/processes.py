"""launch/pretrain_gpt.py on several ranks, forked from a server that has imported all; to be watched and killed."""

from __future__ import annotations

import os
import re
import sys
import time
from contextlib import ExitStack

from noflush.demo.port import held_port
from tests.multiproc.ranks import CONTEXT


def _rank(argv, rank, world, port, log):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
        WANDB_MODE="offline",
    )  # fmt: skip
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    import torch

    from noflush.launch.pretrain_gpt import main

    torch.set_num_threads(1)
    code = main(argv)
    sys.stdout.flush()
    os._exit(code)


class Run:
    """A run's processes, its log files in ``folder``."""

    def __init__(self, argv, world, folder, name):
        self._held = ExitStack()
        port = self._held.enter_context(held_port())
        self.logs = [folder / f"{name}-{rank}.log" for rank in range(world)]
        self.processes = [
            CONTEXT.Process(target=_rank, args=(argv, rank, world, port, str(self.logs[rank]))) for rank in range(world)
        ]
        self.start = time.monotonic()
        for process in self.processes:
            process.start()

    def wait(self, timeout):
        """Exit codes; None for a rank that did not end in time, which is then killed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.05, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        self._held.close()
        return codes

    def text(self, rank):
        """What a rank has printed."""
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def losses(self):
        """Loss as printed by iteration, from the last rank's log."""
        found = re.findall(r"iteration +(\d+)/.*?lm loss: (\S+)", self.text(-1))
        return {int(iteration): loss for iteration, loss in found}
