"""Time that an update spends waiting for other stages, which is bubble: with a flush the last one is waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Waits:
    """Of one stage's updates, by the host's clock (a device's own counts its collectives as work)."""

    def __init__(self) -> None:
        self._ns = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What is done within is waiting."""
        begun = time.perf_counter_ns()
        yield
        self._ns += time.perf_counter_ns() - begun

    def take(self) -> int:
        """Nanoseconds since the last take."""
        ns, self._ns = self._ns, 0
        return ns
