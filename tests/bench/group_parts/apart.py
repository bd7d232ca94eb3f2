"""Groups on hosts of their own: a network namespace each, and one for the lighthouse. Needs root."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from typing import Any

from tests.bench.wan_parts.network import Wan, enter
from tests.multiproc.ranks import CONTEXT

PORT = 29510
"""The lighthouse's, in a namespace of its own."""


def be_rank(rank: int, world: int, port: int, master: str, name: str, log: str) -> None:
    """Makes this process a rank of a world that is there, on the host of namespace ``name``.

    What it says goes to the file ``log``.
    """
    enter(name)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR=master, MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="wan0", DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    import deepspeed
    import torch

    import noflush

    noflush.register()
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")


class LighthouseApart:
    """A lighthouse on the last of ``wan``'s hosts, which can be killed.

    Args:
        wan: the hosts.
        join_timeout_s: how long a round waits for a group that is alive and has not come to it.
        min_groups: without so many there is no round.

    Attributes:
        address: its ``host:port``.
    """

    def __init__(self, wan: Wan, join_timeout_s: float, min_groups: int = 1) -> None:
        self._kwargs = {"join_timeout_s": join_timeout_s, "min_groups": min_groups}
        self._host, self._namespace = wan.address(wan.hosts - 1), wan.name(wan.hosts - 1)
        self.address = f"{self._host}:{PORT}"

    def start(self) -> None:
        """And waits until it answers."""
        self._process = CONTEXT.Process(target=_serve, args=(self._namespace, self._host), kwargs=self._kwargs)
        self._process.start()
        asks = ["ip", "netns", "exec", self._namespace, "bash", "-c", f"exec 3<>/dev/tcp/{self._host}/{PORT}"]
        deadline = time.monotonic() + 60
        while subprocess.run(asks, capture_output=True).returncode:
            if time.monotonic() > deadline:
                raise TimeoutError("the lighthouse does not answer")
            time.sleep(0.05)

    def kill(self) -> None:
        """At once."""
        self._process.kill()
        self._process.join()


def _serve(namespace: str, host: str, **kwargs: Any) -> None:
    enter(namespace)
    from noflush.replicas.lighthouse import Lighthouse

    server = Lighthouse(bind=host, port=PORT, **kwargs)
    while server.address and multiprocessing.parent_process().is_alive():  # it ends with its last reference
        time.sleep(1)
