"""Losses over seeds: how much they scatter, and how far one difference is beyond that. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample; None for one) over seeds; infinite where any seed diverged."""

    mean: float
    deviation: float | None
    diverged: int = 0


def spread(losses: Sequence[float]) -> Spread:
    """Of losses by seed, at least one."""
    if diverged := sum(not math.isfinite(loss) for loss in losses):
        return Spread(math.inf, None, diverged)
    return Spread(statistics.fmean(losses), statistics.stdev(losses) if len(losses) > 1 else None)


@dataclass(frozen=True)
class Difference:
    """``nats`` by which one loses more than another, and that in standard ``errors`` of seed noise, if known."""

    nats: float
    errors: float | None
    paired: bool


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Of losses by seed. Equal seeds see the same first weights and batches and are paired; else it is Welch's.

    Paired: the standard error is that of the mean of the differences, sd / sqrt(n). Welch (1947): sqrt(sd_1^2 / n_1 +
    sd_2^2 / n_2). None if any run diverged; no ``errors`` from a single seed, or where there is no noise at all.
    """
    if not one or not other or not all(map(math.isfinite, [*one.values(), *other.values()])):
        return None
    nats = statistics.fmean(one.values()) - statistics.fmean(other.values())
    paired = one.keys() == other.keys()
    if min(len(one), len(other)) < 2:
        return Difference(nats, None, paired)
    if paired:
        noise = statistics.variance(one[seed] - other[seed] for seed in one) / len(one)
    else:
        noise = sum(statistics.variance(losses.values()) / len(losses) for losses in (one, other))
    return Difference(nats, nats / math.sqrt(noise) if noise else None, paired)
