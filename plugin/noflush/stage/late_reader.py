"""Small device tensors that are read in a later call, when they have long arrived, so that no update waits for them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Note:
    call: int
    number: int
    values: Tensor
    arrived: torch.cuda.Event | None


class LateReader:
    """Small device tensors on their way to the CPU, read in a later call without waiting."""

    def __init__(self) -> None:
        self._notes: deque[_Note] = deque()

    def put(self, call: int, number: int, values: Tensor) -> None:
        """Starts the copy of ``values``, which belong to ``call`` and are known by ``number``."""
        arrived = None
        if values.is_cuda:
            # Only a copy into pinned memory does not wait.
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._notes.append(_Note(call, number, values, arrived))

    def take(self, before: int) -> list[tuple[int, list[float]]]:
        """(number, values) of all that belong to calls below ``before``, in order."""
        found = []
        while self._notes and self._notes[0].call < before:
            note = self._notes.popleft()
            if note.arrived is not None:
                note.arrived.synchronize()
            found.append((note.number, note.values.tolist()))
        return found

    def snapshot(self) -> list[tuple[int, int, list[float]]]:
        """(call, number, values) of all that has not been taken; it stays to be taken."""
        for note in self._notes:
            if note.arrived is not None:
                note.arrived.synchronize()
        return [(note.call, note.number, note.values.tolist()) for note in self._notes]

    def resume(self, snapshot: list[tuple[int, int, list[float]]]) -> None:
        """Puts a `snapshot` in place of what there is."""
        notes = (_Note(call, number, torch.tensor(values).double(), None) for call, number, values in snapshot)
        self._notes = deque(notes)

    def clear(self) -> None:
        """Forgets what is on its way."""
        self._notes.clear()
