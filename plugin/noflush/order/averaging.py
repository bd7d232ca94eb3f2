"""When a group of pipelines' weights are averaged, which part of them, and how. Pure.

A *group* is one pipeline with its own world. A *round* averages one slice of a stage's weights over the same stage of
all groups, while all of them train: what was sent after one update is heard of some updates later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Drift = Literal["corrected", "none"]
FIRST_SMOOTHING, LAST_SMOOTHING, SMOOTHING_VISITS = 0.5, 0.01, 50


@dataclass(frozen=True)
class Part:
    """What one group contributed to a round, at one stage.

    Attributes:
        key: of the group.
        update: after which its slice was copied.
        samples: its weight in the average.
    """

    key: str
    update: int
    samples: float


@dataclass(frozen=True)
class Exchange:
    """What one stage of one group had of one round, for the simulator to do the same.

    Attributes:
        number: of the round.
        start, length: the slice, in elements of the stage's weights.
        sent_at, applied_at: the updates after which it was copied, and added to the newest version.
        parts: of all groups, in the order in which they are summed.
        caught_up: steps by which the learning rate's schedule went ahead.
    """

    number: int
    start: int
    length: int
    sent_at: int
    applied_at: int
    parts: tuple[Part, ...]
    caught_up: int = 0


def slices_of(fraction: float) -> int:
    """How many slices the weights have, of which a round averages one."""
    return max(1, math.ceil(1.0 / fraction - 1e-9))


def slice_of(number: int, elements: int, fraction: float) -> tuple[int, int]:
    """Start and length, in elements, of what round ``number`` averages: every slice in turn."""
    count = slices_of(fraction)
    size = -(-elements // count)
    start = min(number % count * size, elements)
    return start, min(size, elements - start)


def due(update: int, started: int, every: int) -> bool:
    """Whether a round is to start after ``update``, the newest having started after update ``started``."""
    return update - started >= every


def schedule_behind(position: float, others: Sequence[tuple[float, float]], step: float = 1.0) -> int:
    """By how many updates a group's learning-rate schedule is to go ahead, for all to be about as far.

    To the mean position of all groups, by the samples that each has contributed; never back. So a slow group's rate
    falls with the training it takes part in, and not with its own few updates.

    Args:
        position: of this group's schedule, in units of its own.
        others: samples and position of every group, this one's among them.
        step: what an update adds to a position.
    """
    total = sum(samples for samples, _ in others)
    if not total:
        return 0
    return max(0, int((sum(samples * at for samples, at in others) / total - position) / step))


def smoothing(visits: int) -> float:
    """How much of a newly seen drift goes into its moving average: from .5 to .01, by a cosine over 50 visits.

    AsyncMesh (arXiv 2601.22442) as summarised by others, where it falls over 1000 iterations; a slice is visited every
    few hundred updates, so what counts here is how often its drift was seen.
    """
    done = min(1.0, visits / SMOOTHING_VISITS)
    return LAST_SMOOTHING + (FIRST_SMOOTHING - LAST_SMOOTHING) * (1 + math.cos(math.pi * done)) / 2
