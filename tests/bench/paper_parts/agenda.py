"""Which run's slice is next, and the learning rate that trials lead to. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.paper_parts.setting import Run


@dataclass(frozen=True)
class Standing:
    """How far a run is.

    Attributes:
        slices: that were started.
        reached: iteration of its newest checkpoint.
        loss: validation loss at its end; None until it is there.
    """

    run: Run
    slices: int
    reached: int
    loss: float | None

    @property
    def finished(self) -> bool:
        return self.loss is not None


@dataclass(frozen=True)
class Entry:
    """A contestant: its trials, and its training once those have said by which rate."""

    trials: tuple[Standing, ...]
    main: Standing | None

    @property
    def left(self) -> list[Standing]:
        """What it has still to do, before anything else that it has."""
        trials = [one for one in self.trials if not one.finished]
        if trials or self.main is None:
            return trials
        return [] if self.main.finished else [self.main]

    @property
    def slices(self) -> int:
        return sum(one.slices for one in (*self.trials, *([self.main] if self.main else [])))


def next_of(entries: Sequence[Entry], aside: Collection[Path] = ()) -> Standing | None:
    """The run whose slice is next: of the contestant that had fewest, the first among equals. None: nothing is left.

    ``aside``: folders of runs that failed, which are passed over; a contestant's training waits for all of its trials.
    """
    able = [(entry, [one for one in entry.left if one.run.folder not in aside]) for entry in entries]
    able = [(entry, left) for entry, left in able if left]
    if not able:
        return None
    _, left = min(able, key=lambda each: each[0].slices)
    return min(left, key=lambda one: one.slices)


def best_rate(trials: Sequence[Standing]) -> float | None:
    """The rate of least validation loss, the smaller of two that are equal; None until all trials have finished.

    Raises ValueError if none of them ended with a finite loss.
    """
    if not all(one.finished for one in trials):
        return None
    finite = [(one.loss, one.run.lr) for one in trials if one.loss is not None and math.isfinite(one.loss)]
    if not finite:
        rates = ", ".join(f"{one.run.lr:g}" for one in trials)
        raise ValueError(f"no trial ended with a finite loss, of learning rates {rates}: give smaller ones to --tune")
    return min(finite)[1]
