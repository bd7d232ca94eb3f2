"""Updates that met gradients which are not finite: which, how many, how many in a row. No host.

Whether an update was skipped is known on the device first. It is read one call later, when the answer has long
arrived, so that no update waits for it; and always then, so that every replica of a stage learns it in the same call.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from noflush.kernels.flat import Outcome


class NonFiniteGradients(RuntimeError):
    """A stage skipped too many updates in a row. The weights are those from before the first of them."""


@dataclass(frozen=True)
class _Pending:
    call: int
    update: int
    values: Tensor
    arrived: torch.cuda.Event | None


class SkippedUpdates:
    """Counts a stage's skipped updates.

    Attributes:
        total: since the start (or the checkpoint).
        in_a_row: the newest of them without a finite update between.
    """

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row = 0
        self._pending: deque[_Pending] = deque()

    def note(self, call: int, update: int, outcome: Outcome) -> None:
        """Remembers the outcome of ``update``, made during ``call``; does not wait for it."""
        values = torch.stack([outcome.norm, outcome.skipped]).detach()
        arrived = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._pending.append(_Pending(call, update, values, arrived))

    def settle(self, before: int) -> list[tuple[int, float]]:
        """(update, norm) of the skipped updates made in calls below ``before``, counted now."""
        skipped = []
        while self._pending and self._pending[0].call < before:
            pending = self._pending.popleft()
            if pending.arrived is not None:
                pending.arrived.synchronize()
            norm, flag = pending.values.tolist()
            self.in_a_row = self.in_a_row + 1 if flag else 0
            if flag:
                self.total += 1
                skipped.append((pending.update, norm))
        return skipped

    def clear(self) -> None:
        """Forgets what is pending and the row, after a checkpoint was loaded."""
        self._pending.clear()
        self.in_a_row = 0
