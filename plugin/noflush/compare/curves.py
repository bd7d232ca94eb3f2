"""Losses along a training. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

Curve = Sequence[tuple[float, float]]
"""(tokens, loss), tokens rising."""


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """The mean over seeds, up to the first point that not all of them have; infinite where any is."""
    return [
        (points[0][0], statistics.fmean(loss for _, loss in points))
        for points in zip(*curves, strict=False)
        if len({tokens for tokens, _ in points}) == 1
    ]


def loss_at(curve: Curve, tokens: float) -> float:
    """The loss after ``tokens``, between points on a straight line; at its ends that of the end."""
    for (a, before), (b, after) in itertools.pairwise(curve):
        if a <= tokens <= b:
            return before + (after - before) * (tokens - a) / (b - a)
    return curve[0][1] if tokens < curve[0][0] else curve[-1][1]


def tokens_to(curve: Curve, loss: float) -> float | None:
    """Tokens after which ``curve`` first is down to ``loss``, between points on a straight line; None: never."""
    if curve and curve[0][1] <= loss:
        return curve[0][0]
    for (a, before), (b, after) in itertools.pairwise(curve):
        if after <= loss:
            return b if not math.isfinite(before) else a + (b - a) * (before - loss) / (before - after)
    return None
