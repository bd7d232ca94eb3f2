"""What a stage adds to its newest weights when an average is heard that was sent some updates ago."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from noflush.order.averaging import Drift


def averaged(total: Tensor, samples: Sequence[float]) -> Tensor | None:
    """The groups' mean by samples, out of the sum of their slices times those; None where none had any."""
    return total / sum(samples) if sum(samples) else None


@torch.no_grad()
def weighted_average(slices: Sequence[Tensor], samples: Sequence[float]) -> Tensor | None:
    """The same of all groups' ``slices`` (float32) in one place: bit for bit, for both add in the order of groups."""
    return averaged(sum((s * w for s, w in zip(slices, samples, strict=True)), torch.zeros(())), samples)


@torch.no_grad()
def correction(
    drift: Drift, sent: Tensor, average: Tensor, now: Tensor, rate: Tensor | None, updates: int, smoothing: float
) -> tuple[Tensor, Tensor | None]:
    """What to add to ``now``, and the moving average of the drift, which the slice's next round takes.

    ``none`` adds what the average differs by from what was sent: all that was learnt here since is kept. ``corrected``
    (AsyncMesh, arXiv 2601.22442) takes the average for what it was ``updates`` ago, and moves it by how far this group
    is used to move in so many updates, a moving average over rounds, since the others have moved too: the result is
    the same at groups that drift alike, where ``none`` leaves each with the noise of its newest batches.

    Args:
        sent, average, now: the slice as it was sent, averaged over groups, and as it is; float32.
        rate: as returned for this slice's round before; None at first. A change an update.
        updates: made since it was sent; at least 1.
        smoothing: how much of the drift now seen goes into the moving average.
    """
    if drift == "none":
        return average - sent, None
    seen = (now - sent) / updates
    rate = seen if rate is None else rate + smoothing * (seen - rate)
    return average + updates * rate - now, rate
