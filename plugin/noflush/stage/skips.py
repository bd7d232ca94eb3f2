"""Updates that met gradients which are not finite: which, how many in a row, and what a stage does about them.

It says so, tells the others, and ends a run that goes nowhere. Whether an update was skipped is known on the device
first. It is read one call later, when the answer has long arrived, so that no update waits for it; and always then, so
that every replica of a stage learns it in the same call.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from noflush.methods.flat import Outcome
from noflush.order.schedule import Schedule
from noflush.stage.late_reader import LateReader
from noflush.stage.messages import Notices, ReportLayout

logger = logging.getLogger("noflush")

# From 2^16 to 1, with some hysteresis.
_HALVINGS = 20


class NonFiniteGradients(RuntimeError):
    """A stage skipped too many updates in a row. The weights are those from before the first of them."""


class SkippedUpdates:
    """Counts a stage's skipped updates.

    Attributes:
        total: since the start, that of loaded checkpoints included.
        in_a_row: the newest of them without a finite update between.
    """

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row = 0
        self._outcomes = LateReader()

    def note(self, call: int, update: int, outcome: Outcome) -> None:
        """Remembers the outcome of ``update``, made during ``call``; does not wait for it."""
        self._outcomes.put(call, update, torch.stack([outcome.norm, outcome.skipped]).detach())

    def settle(self, before: int) -> list[tuple[int, float]]:
        """(update, norm) of the skipped updates made in calls below ``before``, counted now."""
        skipped = []
        for update, (norm, flag) in self._outcomes.take(before):
            self.in_a_row = self.in_a_row + 1 if flag else 0
            if flag:
                self.total += 1
                skipped.append((update, norm))
        return skipped

    def restart(self, total: int) -> None:
        """Counts on from a loaded checkpoint's ``total``."""
        self._outcomes.clear()
        self.total, self.in_a_row = total, 0

    def snapshot(self) -> dict[str, Any]:
        """What `resume` takes."""
        return {"total": self.total, "in_a_row": self.in_a_row, "outcomes": self._outcomes.snapshot()}

    def resume(self, snapshot: dict[str, Any]) -> None:
        """Puts a `snapshot` back."""
        self.total, self.in_a_row = snapshot["total"], snapshot["in_a_row"]
        self._outcomes.resume(snapshot["outcomes"])


class UpdateGuard:
    """One stage's.

    Args:
        schedule, stage: where it stands.
        layout: of the reports.
        allowed: updates that a stage may skip in a row.
        stop_dir: where the checkpoint of a stopped run goes; None: see `UpdateGuard.stop_dir`.
        scaled: whether a dynamic loss scale may have to fall first.

    Attributes:
        skips: the stage's count.
        stop_requested: whether this rank was asked to stop or heard of it.
        saved_to: the folder of the run's newest checkpoint; None before any.
        horizon: batches after which no stage can still tell of an overflow.
    """

    def __init__(
        self,
        schedule: Schedule,
        stage: int,
        layout: ReportLayout,
        allowed: int,
        stop_dir: str | None = None,
        scaled: bool = False,
    ) -> None:
        self.skips = SkippedUpdates()
        self._reports = LateReader()
        self._in_a_row = [0]
        self.stop_requested = False
        self.saved_to: str | None = None
        self._stage = stage
        self._allowed = allowed
        self._scaled = scaled
        self.follow(schedule)
        self._stop_dir = stop_dir
        self._untold: tuple[int, ...] = ()
        self._layout = layout

    def follow(self, schedule: Schedule) -> None:
        """Judges by ``schedule`` from now on; nothing may be in flight."""
        # A batch's update at stage 0 comes so many calls after its loss, is read a call later and sent with the next.
        self.horizon = -(-schedule.lag(0) // schedule.gas) + 4
        # A loss scale on its way down: each halving costs the first stages the batches that were in flight with it.
        self._limit = self._allowed + (_HALVINGS * self.horizon if self._scaled else 0)

    def hear(self, call: int, batch: int, report: Tensor) -> None:
        """Takes ``batch``'s report, which came in during ``call``; by it the first stage judges the others."""
        if self._stage == 0:
            self._reports.put(call, batch, report[self._layout.in_a_row.start : self._layout.stop + 1])

    def notices(self, before: int) -> Notices:
        """What this stage has to tell with the next call's header.

        ``before``: what was learnt in calls below is read now.
        """
        self.settle(before)
        return Notices(
            skipped=self.take_untold(),
            stopped_by=self._judge() if self._stage == 0 else None,
            stop_requested=self.stop_requested,
        )

    def settle(self, before: int) -> None:
        """Reads what was learnt in calls below ``before``; what there is to tell waits for the next `notices`."""
        skipped = self.skips.settle(before)
        self._untold += tuple(update - 1 for update, _ in skipped)  # update n is that of batch n - 1
        for update, norm in skipped:
            logger.warning(
                "noflush: stage %d skipped update %d: its gradient norm is %s (%d skipped in a row, %d in all)",
                self._stage, update, norm, self.skips.in_a_row, self.skips.total,
            )  # fmt: skip
        for _, (*in_a_row, stop) in self._reports.take(before):
            self._in_a_row = [0 if math.isnan(n) else int(n) for n in in_a_row]
            self.stop_requested |= not math.isnan(stop)
        self._in_a_row[:1] = [self.skips.in_a_row]

    def take_untold(self) -> tuple[int, ...]:
        """Batches whose skipped updates nobody has been told of yet."""
        untold, self._untold = self._untold, ()
        return untold

    def _judge(self) -> tuple[int, int] | None:
        worst = max(range(len(self._in_a_row)), key=self._in_a_row.__getitem__)
        count = self._in_a_row[worst]
        return (worst, count) if count >= self._limit else None

    def stop_dir(self) -> str:
        """Where the checkpoint of a stopped run goes."""
        return self._stop_dir or self.saved_to or "noflush_stopped"

    def error(self, stopped_by: tuple[int, int], checkpoint: str) -> NonFiniteGradients:
        """Why the run ends, what was saved, and what to do."""
        stage, count = stopped_by
        return NonFiniteGradients(
            f"stage {stage} skipped {count} updates in a row (max_skipped_updates allows {self._limit}): "
            "its gradients are not finite. Its weights are those from before the first of them; the run is saved in "
            f"{checkpoint}. Look at the data of these calls, or lower the learning rate, and load that checkpoint or "
            "an older one"
        )

    def restart(self, total: int) -> None:
        """Counts on from a loaded checkpoint's ``total``."""
        self.skips.restart(total)
        self._untold = ()
        self._reports.clear()
        self._in_a_row = [0]

    def snapshot(self) -> dict[str, Any]:
        """What `resume` takes. Whether the run is to stop is not in it: the next one is not."""
        return {
            "skips": self.skips.snapshot(),
            "untold": self._untold,
            "in_a_row": self._in_a_row,
            "reports": [
                (call, batch, [*in_a_row, math.nan]) for call, batch, (*in_a_row, _) in self._reports.snapshot()
            ],
        }

    def resume(self, snapshot: dict[str, Any]) -> None:
        """Puts a `snapshot` back."""
        self.skips.resume(snapshot["skips"])
        self._untold, self._in_a_row = tuple(snapshot["untold"]), list(snapshot["in_a_row"])
        self._reports.resume(snapshot["reports"])
