"""Where a group's processes listen: at the address that the block names, and nowhere else.

Left to themselves torch's store and torchft's manager listen at every address of the host, and gloo at the one that the
host's name stands for.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

from torch.distributed import ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]
from torchft import manager

_INTERFACE = "GLOO_SOCKET_IFNAME"


def store_at(address: str) -> TCPStore:
    """A store that others reach at ``address``, at a port of the system's choice."""
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    # The store closes what it is given.
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


@contextlib.contextmanager
def manager_at(address: str) -> Iterator[None]:
    """Within, torchft's ``Manager`` has its server listen at ``address``; it has no argument for that."""
    server = manager.ManagerServer

    def bound(**words: Any) -> Any:
        port = words["bind"].rpartition(":")[2]
        return server(**words | {"bind": f"{address}:{port}"})

    manager.ManagerServer = bound
    try:
        yield
    finally:
        manager.ManagerServer = server


def gloo_device(address: str) -> Any:
    """gloo's at ``address``; where the environment names an interface, at that one."""
    if os.environ.get(_INTERFACE):
        return ProcessGroupGloo.create_default_device()
    return ProcessGroupGloo.create_device(hostname=address)
