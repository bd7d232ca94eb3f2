"""A port of this machine for processes that are still to be started."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A free port that stays this process's until the block ends, and that a child of it may listen on meanwhile.

    A port that is only found free is given to whoever asks next. So it is bound, but not listened on: the system then
    gives it to nobody who asks for any port, while a listener that names it and sets SO_REUSEADDR, as torch's store
    does, gets it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]
