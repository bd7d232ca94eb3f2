"""What a stage has heard of the run's batches from the others: their losses, and which of them were skipped."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

_LOSSES_KEPT = 1000


class Heard:
    """One stage's.

    Attributes:
        skipped: batches that some stage so far has skipped, each counted once.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._newly_skipped: set[int] = set()
        self._losses: deque[tuple[int, Tensor]] = deque(maxlen=_LOSSES_KEPT)

    def loss(self, step: int, loss: Tensor) -> None:
        """The loss of call ``step`` (from 1), 0-dim."""
        self._losses.append((step, loss))

    def take_losses(self) -> dict[int, float]:
        """Losses by call, each once; of what is never taken the newest 1000 are kept. Waits for the device."""
        found = {step: float(loss) for step, loss in self._losses}
        self._losses.clear()
        return found

    def of_skipped(self, batches: tuple[int, ...], horizon: int) -> None:
        """``batches`` were skipped, by one stage or several; nobody tells any more of those below ``horizon``."""
        news = set(batches) - self._newly_skipped
        self.skipped += len(news)
        self._newly_skipped = {batch for batch in self._newly_skipped | news if batch >= horizon}

    def forget_losses(self) -> None:
        """Losses that nobody took are of no interest any more."""
        self._losses.clear()

    def snapshot(self) -> dict[str, Any]:
        """What `resume` takes."""
        return {
            "skipped": self.skipped,
            "newly_skipped": sorted(self._newly_skipped),
            "losses": list(self._losses),
        }

    def resume(self, snapshot: dict[str, Any]) -> None:
        """Puts a `snapshot` back."""
        self.skipped, self._newly_skipped = snapshot["skipped"], set(snapshot["newly_skipped"])
        self._losses = deque(snapshot["losses"], maxlen=_LOSSES_KEPT)
