"""By which norm a stage clips, and which batch's norm of the whole pipeline it can know without waiting. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from noflush.order.schedule import Schedule

ClipName = Literal["stage", "lagged_global", "global"]


def known_batch(schedule: Schedule, batch: int) -> int:
    """The newest batch whose norm every stage knows when it updates by ``batch``; below 0: none is known yet.

    Batches are counted from the segment's start. The stages' norms of batch g go up with the losses of batch g + 1,
    since an update is made when its gradients have gone on; they are at stage 0 in call g + 1 + ceil(lag/K), are read
    there two calls later, when they have long left the device, and come down with that call's header. A call's header
    comes before the update by its batch at every stage, and before a drain could, so this holds of a batch that a drain
    finishes too.
    """
    return batch - 3 - schedule.loss_lag(0)


def newest_finite(norms: Sequence[float], up_to: int) -> float | None:
    """The newest of ``norms`` (by batch) up to number ``up_to`` that is finite: what a skipped update leaves out."""
    return next((norms[batch] for batch in range(up_to, -1, -1) if math.isfinite(norms[batch])), None)
