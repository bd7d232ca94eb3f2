"""How long a device computed, from pairs of events on its stream, read when they are long over.

The CPU that drives an accelerator only enqueues: its own clock tells when work was issued. Between a pair's two events
lies what the device did for one action; what lies between pairs is waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from noflush.order.actions import Op


@dataclass(frozen=True)
class _Pair:
    op: Op | None
    """None: a whole call."""
    start: Any
    end: Any


class DeviceTimes:
    """Event pairs on their way.

    Args:
        new_event: makes an event with ``record()``, ``query()`` and ``elapsed_time(other)`` in milliseconds.
    """

    def __init__(self, new_event: Callable[[], Any] | None = None) -> None:
        self._new_event = new_event or (lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._pairs: deque[_Pair] = deque()
        self._free: list[Any] = []

    def mark(self) -> Any:
        """An event on the current stream, now."""
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        return event

    def add(self, op: Op | None, start: Any) -> None:
        """What was enqueued since ``start`` was ``op`` (None: a whole call)."""
        self._pairs.append(_Pair(op, start, self.mark()))

    def settle(self) -> list[tuple[Op | None, int]]:
        """(op, nanoseconds) of the pairs that are over, in order; asks, and waits for none."""
        settled = []
        while self._pairs and self._pairs[0].end.query():
            pair = self._pairs.popleft()
            settled.append((pair.op, round(pair.start.elapsed_time(pair.end) * 1e6)))
            self._free += [pair.start, pair.end]
        return settled
