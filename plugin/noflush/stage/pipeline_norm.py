"""The gradient norm of the whole pipeline, a few batches late: in messages that exist, and waited for by nobody.

1. a stage remembers the norm of each update; the square goes up with the losses of the next batch, added to those from
   below;
2. the first stage has the sum on its device, and reads it in a later call, when it has long arrived;
3. it tells the newest that is finite with every call's header, so that all stages know the same number.

`clipping.known_batch` says which batch's that is. It starts anew after a drain.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from noflush.stage.late_reader import LateReader
from noflush.stage.messages import BatchNorm


class PipelineNorm:
    """One stage's side.

    Args:
        counts: whether its norm goes into the sum; where all stages share one norm, the first stage's alone does.

    Attributes:
        newest: the newest norm that was told; None before any. A drain leaves it.
    """

    def __init__(self, counts: bool = True) -> None:
        self.newest: BatchNorm | None = None
        self._counts = counts
        self._square: Tensor | None = None  # of this stage's newest update
        self._arriving = LateReader()
        self._known: BatchNorm | None = None  # at the first stage
        self._told: dict[int, float] = {}  # by the batch whose call opened with it

    def note(self, norm: Tensor) -> None:
        """An update was made of gradients with this norm: 0-dim float32, unscaled; not read."""
        self._square = norm.detach().double() ** 2

    def add_to(self, squares: Tensor) -> Tensor:
        """The sum that goes up: ``squares`` (0-dim float64; those of the stages below) and this stage's.

        nan before the segment's first update.
        """
        if self._square is None:
            return torch.full_like(squares, math.nan)
        return squares + self._square if self._counts else squares

    def arrived(self, call: int, step: int, squares: Tensor) -> None:
        """At the first stage: all stages' squares of the batch of call ``step``, complete during ``call``."""
        self._arriving.put(call, step, squares.sqrt().float().reshape(1))

    def tell(self, before: int) -> BatchNorm | None:
        """At the first stage: what goes into a call's header. ``before``: what arrived in calls below is read now."""
        for step, (norm,) in self._arriving.take(before):
            if math.isfinite(norm):  # an update was skipped, or there was none
                self._known = BatchNorm(step, norm)
        return self._known

    def hear(self, call: int, told: BatchNorm | None) -> None:
        """The header of ``call`` (from 0, the number of its batch) said so."""
        if told is not None:
            self.newest = told
            self._told[call] = told.norm

    def of_update(self, batch: int) -> float:
        """The norm by which the update by ``batch`` (from 0) clips, if the stage's own is not larger; 0: not known."""
        return self._told.pop(batch, 0.0)

    def restart(self) -> None:
        """Nothing is in flight: what was carried is of no use to the next segment."""
        self._square = self._known = None
        self._told.clear()
        self._arriving.clear()

    def snapshot(self) -> dict[str, Any]:
        """What `resume` takes, for a checkpoint of a full pipeline."""
        return {
            "square": self._square,
            "arriving": self._arriving.snapshot(),
            "norms": [one and (one.step, one.norm) for one in (self.newest, self._known)],
            "told": dict(self._told),
        }

    def resume(self, snapshot: dict[str, Any], device: torch.device) -> None:
        """Puts a `snapshot` back; ``device``: where the stage computes."""
        square = snapshot["square"]
        self._square = None if square is None else square.to(device)
        self._arriving.resume(snapshot["arriving"])
        self.newest, self._known = (one and BatchNorm(*one) for one in snapshot["norms"])
        self._told = dict(snapshot["told"])
