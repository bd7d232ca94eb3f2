"""The loss scale of fp16 without a flush. Pure but for DeepSpeed's scaler, which it is given.

One scale for the whole pipeline cannot be agreed on without draining it, so the scale travels:

1. the last stage owns it. It fixes a batch's scale before the batch's first backward, and scales the loss by it;
2. the gradients carry it upstream: the scale goes with the batch's last gradient message, and each stage unscales
   its update of that batch by it;
3. a stage whose gradients overflow skips its own update, and tells the last stage with the next call's header;
4. the last stage lets the scale fall for an overflow of a batch that had the newest scale. Batches in flight with
   an older, larger one may overflow too; that is no news.
"""

from __future__ import annotations

from typing import Any, Protocol


class Scaler(Protocol):
    """DeepSpeed's LossScaler or DynamicLossScaler: the arithmetic of windows, hysteresis and limits."""

    cur_scale: float

    def update_scale(self, overflow: bool) -> None:
        """One batch went well, or overflowed."""


class TravellingScale:
    """The last stage's side of the protocol.

    Args:
        scaler: decides how far the scale falls and when it grows again.
        horizon: batches after which no stage can still report an overflow.
    """

    def __init__(self, scaler: Scaler, horizon: int) -> None:
        self._scaler = scaler
        self._horizon = horizon
        self._generation = 0
        self._generations: dict[int, int] = {}
        self._overflow = False
        self._fresh = True

    def begin(self, batch: int) -> float:
        """The scale of ``batch``, fixed before its first backward; settles what was heard since the last one."""
        self.settle()
        self._fresh = False
        self._generations[batch] = self._generation
        self._generations.pop(batch - self._horizon, None)
        return float(self._scaler.cur_scale)

    @property
    def remembered(self) -> int:
        """Batches of which an overflow would still be news."""
        return len(self._generations)

    def settle(self) -> None:
        """Judges the batches begun since the last time, by what was heard. After a drain, that is all there is."""
        if not self._fresh:
            before = self._scaler.cur_scale
            self._scaler.update_scale(self._overflow)
            if self._scaler.cur_scale < before:
                self._generation += 1
        self._fresh, self._overflow = True, False

    def snapshot(self) -> dict[str, Any]:
        """What `resume` takes; the scaler is saved by whose it is."""
        return {
            "generation": self._generation,
            "generations": dict(self._generations),
            "overflow": self._overflow,
            "fresh": self._fresh,
        }

    def resume(self, snapshot: dict[str, Any]) -> None:
        """Puts a `snapshot` back."""
        self._generation, self._generations = snapshot["generation"], dict(snapshot["generations"])
        self._overflow, self._fresh = snapshot["overflow"], snapshot["fresh"]

    def hear(self, batch: int) -> None:
        """Some stage skipped its update of ``batch``."""
        if self._generations.get(batch) == self._generation:
            self._overflow = True
