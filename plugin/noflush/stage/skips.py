"""Updates that met gradients which are not finite: which, how many, how many in a row. No host.

Whether an update was skipped is known on the device first. It is read one call later, when the answer has long
arrived, so that no update waits for it; and always then, so that every replica of a stage learns it in the same call.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from noflush.methods.flat import Outcome


class NonFiniteGradients(RuntimeError):
    """A stage skipped too many updates in a row. The weights are those from before the first of them."""


@dataclass(frozen=True)
class _Note:
    call: int
    number: int
    values: Tensor
    arrived: torch.cuda.Event | None


class LateReader:
    """Small device tensors on their way to the host, read in a later call without waiting."""

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

    def clear(self) -> None:
        """Forgets what is on its way."""
        self._notes.clear()


class SkippedUpdates:
    """Counts a stage's skipped updates, and keeps its newest norm.

    Attributes:
        total: since the start, that of loaded checkpoints included.
        in_a_row: the newest of them without a finite update between.
        norm: gradient norm of the newest update that was counted; nan before any.
    """

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row = 0
        self.norm = math.nan
        self._outcomes = LateReader()

    def note(self, call: int, update: int, outcome: Outcome) -> None:
        """Remembers the outcome of ``update``, made during ``call``; does not wait for it."""
        self._outcomes.put(call, update, torch.stack([outcome.norm, outcome.skipped]).detach())

    def settle(self, before: int) -> list[tuple[int, float]]:
        """(update, norm) of the skipped updates made in calls below ``before``, counted now."""
        skipped = []
        for update, (norm, flag) in self._outcomes.take(before):
            self.in_a_row = self.in_a_row + 1 if flag else 0
            self.norm = norm
            if flag:
                self.total += 1
                skipped.append((update, norm))
        return skipped

    def restart(self, total: int) -> None:
        """Counts on from a loaded checkpoint's ``total``."""
        self._outcomes.clear()
        self.total, self.in_a_row = total, 0
