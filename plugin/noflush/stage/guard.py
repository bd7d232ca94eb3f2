"""What a stage does about updates that were skipped: says so, tells the others, and ends a run that goes nowhere."""

from __future__ import annotations

import logging
import math

from torch import Tensor

from noflush.config import AsyncPipelineConfig
from noflush.order.schedule import Schedule
from noflush.stage.intake import Notices
from noflush.stage.reports import ReportLayout
from noflush.stage.skips import LateReader, NonFiniteGradients, SkippedUpdates

logger = logging.getLogger("noflush")


# From 2^16 to 1, with some hysteresis.
_HALVINGS = 20


class UpdateGuard:
    """One stage's.

    Args:
        block: its ``max_skipped_updates`` and ``stop_dir``.
        schedule, stage: where it stands.
        layout: of the reports.
        scaled: whether a dynamic loss scale may have to fall first.

    Attributes:
        skips: the stage's count.
        stop_requested: whether this rank was asked to stop or heard of it.
        saved_to: the folder of the run's newest checkpoint; None before any.
        horizon: batches after which no stage can still tell of an overflow.
    """

    def __init__(
        self, block: AsyncPipelineConfig, schedule: Schedule, stage: int, layout: ReportLayout, scaled: bool = False
    ) -> None:
        self.skips = SkippedUpdates()
        self._reports = LateReader()
        self._in_a_row = [0]
        self.stop_requested = False
        self.saved_to: str | None = None
        self._stage = stage
        self._allowed = block.max_skipped_updates
        self._scaled = scaled
        self.follow(schedule)
        self._stop_dir = block.stop_dir
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
        skipped = self.skips.settle(before)
        for update, norm in skipped:
            logger.warning(
                "noflush: stage %d skipped update %d: its gradient norm is %s (%d skipped in a row, %d in all)",
                self._stage, update, norm, self.skips.in_a_row, self.skips.total,
            )  # fmt: skip
        for _, (*in_a_row, stop) in self._reports.take(before):
            self._in_a_row = [0 if math.isnan(n) else int(n) for n in in_a_row]
            self.stop_requested |= not math.isnan(stop)
        self._in_a_row[:1] = [self.skips.in_a_row]
        return Notices(
            overflows=tuple(update - 1 for update, _ in skipped),  # update n is that of batch n - 1
            stopped_by=self._judge() if self._stage == 0 else None,
            stop_requested=self.stop_requested,
        )

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
        self._reports.clear()
        self._in_a_row = [0]
