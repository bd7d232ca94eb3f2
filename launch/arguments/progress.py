"""Progress is samples: where a run stands, and what a number of iterations is in samples, or the other way. Pure.

Whoever has one of the two and needs the other asks here. An iteration takes as many samples as the batch had at its
time, which ``--rampup-batch-size`` changes, and an earlier run with another ``--global-batch-size``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from noflush.launch.arguments.rampup import growth
from noflush.launch.arguments.settings import Batch, Steps


@dataclass
class Position:
    """Where a run stands and how it came there: what a checkpoint must remember to go on at the exact sample.

    Attributes:
        iteration, consumed: iterations done, and the samples they took.
        sizes: (iterations, samples of each) of all that was done, in order. Empty, although iterations were done, in a
            checkpoint that was written before it was kept: `traced` finds it.
    """

    iteration: int = 0
    consumed: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def advance(self, size: int) -> None:
        """One iteration of ``size`` samples more."""
        self.iteration += 1
        self.consumed += size
        count = 0
        if self.sizes and self.sizes[-1][1] == size:
            count, _ = self.sizes.pop()
        self.sizes.append((count + 1, size))


def position_in(state: Mapping[str, Any]) -> Position:
    """A position as a checkpoint holds it: `dataclasses.asdict`'s, through JSON or not.

    Raises ValueError if it is none, or does not add up.
    """
    try:
        found = Position(
            int(state["iteration"]),
            int(state["consumed"]),
            [(int(count), int(size)) for count, size in state.get("sizes", ())],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no position of a run: {error!r}") from None
    if min(found.iteration, found.consumed, *(number for pair in found.sizes for number in pair)) < 0:
        raise ValueError(f"it is no position of a run: {found}")
    counts, samples = sum(count for count, _ in found.sizes), sum(count * size for count, size in found.sizes)
    if found.sizes and (counts, samples) != (found.iteration, found.consumed):
        raise ValueError(
            f"iteration {found.iteration} and {found.consumed} consumed samples, but its batch sizes are {counts} "
            f"iterations of {samples} samples"
        )
    return found


class Course:
    """A run from its first iteration to any other: those done with the sizes they had, the rest as the batch grows.

    Args:
        batch: of the arguments; what iterations to come take.
        start: where the run goes on.
    """

    def __init__(self, batch: Batch, start: Position | None = None) -> None:
        start = start or Position()
        self._sizes = [*start.sizes, *growth(batch, start.consumed)]
        self._full = batch.global_size

    def samples_at(self, iteration: int) -> int:
        """Samples consumed after ``iteration`` iterations."""
        samples = 0
        for count, size in self._sizes:
            samples += min(count, iteration) * size
            iteration -= min(count, iteration)
        return samples + iteration * self._full

    def iterations_at(self, samples: int) -> int:
        """Iterations for which ``samples`` suffice."""
        iterations = 0
        for count, size in self._sizes:
            done = min(count, samples // size)
            iterations += done
            samples -= done * size
            if done < count:
                return iterations
        return iterations + samples // self._full

    def sizes_until(self, iteration: int) -> list[tuple[int, int]]:
        """(iterations, samples of each) of the first ``iteration`` iterations."""
        found = []
        for count, size in [*self._sizes, (iteration, self._full)]:
            done = min(count, iteration)
            iteration -= done
            if done:
                found.append((done, size))
        return found


def traced(position: Position, batch: Batch, in_iterations: tuple[str, ...]) -> Position:
    """``position`` with the sizes it came by, in a checkpoint that does not hold them.

    ``in_iterations``: options that gave a length in iterations.

    Raises:
        ValueError: the samples are not those of these batch sizes, so that lengths in iterations, already taken for
            samples when the checkpoint was opened, would be others.
    """
    if position.sizes or not position.iteration:
        return position
    course = Course(batch)
    if course.samples_at(position.iteration) == position.consumed:
        return dataclasses.replace(position, sizes=course.sizes_until(position.iteration))
    if in_iterations:
        raise ValueError(
            f"the checkpoint has consumed {position.consumed} samples in {position.iteration} iterations, which is not "
            f"what --global-batch-size {batch.global_size} makes of them, and is too old to say its batch sizes: give "
            f"{', '.join(in_iterations)} in samples (--train-samples, --lr-warmup-samples, ...)"
        )
    each, more = divmod(position.consumed, position.iteration)
    sizes = [(position.iteration - more, each), (more, each + 1)]
    return dataclasses.replace(position, sizes=[(count, size) for count, size in sizes if count])


def steps_from(steps: Steps, batch: Batch, position: Position) -> Steps:
    """``steps`` for a run that goes on from ``position``: in samples if that is how its length was given."""
    course = Course(batch, position)
    if steps.by_samples:
        return dataclasses.replace(steps, iterations=max(position.iteration, course.iterations_at(steps.samples)))
    return dataclasses.replace(steps, samples=course.samples_at(steps.iterations))
