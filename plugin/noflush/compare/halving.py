"""Successive halving over learning rates (Jamieson and Talwalkar 2016): who is to run next, given what has run. Pure.

Every rung is a training of its own length with its own warm-up and decay, so that losses of one rung compare with each
other. The state is nothing but the losses known, so a search that was broken off goes on by being asked again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RUNGS = (0.25, 0.5, 1.0)
"""Lengths of the rungs as shares of the search's longest run."""
EXTENSIONS = 2
"""Learning rates by which a grid may grow beyond its edges."""

Runs = Mapping[tuple[int, float], float]
"""Losses by (rung, learning rate); infinite for a run that diverged."""


@dataclass(frozen=True)
class Standing:
    """Where a search stands.

    Attributes:
        wanted: (rung, learning rate) of every run that can be made now; empty once there is a winner.
        later: the rungs of the runs that follow if no grid grows.
        winner: the learning rate found, or None yet.
        at_edge: whether the winner is the smallest or the largest of all that were tried.
    """

    wanted: tuple[tuple[int, float], ...]
    later: tuple[int, ...] = ()
    winner: float | None = None
    at_edge: bool = False


def standing(grid: Sequence[float], runs: Runs) -> Standing:
    """Where the search over ``grid`` (rising) stands when ``runs`` are known.

    The best of the first rung at an edge of the grid lets it grow by one there, by the ratio of the two rates at that
    edge (2 for a single one), at most `EXTENSIONS` times in all. Half as many as ``grid`` has, rounded up, go on to the
    second rung, and half of those to the third; of equal losses the smaller rate is better. One that is left alone has
    won and needs no further rung.
    """
    rates = list(grid)
    for extended in range(EXTENSIONS + 1):
        if missing := [rate for rate in rates if (0, rate) not in runs]:
            return Standing(tuple((0, rate) for rate in missing), tuple(_after(len(grid), 0)))
        best = ranked(rates, runs, 0)[0]
        if extended == EXTENSIONS or best not in (rates[0], rates[-1]):
            break
        grow_down = best == rates[0]
        ratio = 2.0 if len(rates) == 1 else rates[1] / rates[0] if grow_down else rates[-1] / rates[-2]
        rates = [_rounded(best / ratio), *rates] if grow_down else [*rates, _rounded(best * ratio)]
    left, keep = rates, len(grid)
    for rung in range(len(RUNGS)):
        if missing := [rate for rate in left if (rung, rate) not in runs]:
            return Standing(tuple((rung, rate) for rate in missing), tuple(_after(keep, rung)))
        keep = 1 if rung == len(RUNGS) - 1 else (keep + 1) // 2
        left = ranked(left, runs, rung)[:keep]
        if keep == 1:
            break
    return Standing((), (), left[0], left[0] in (rates[0], rates[-1]))


def ranked(rates: Sequence[float], runs: Runs, rung: int) -> list[float]:
    """``rates`` from the best loss of ``rung`` to the worst, the smaller first among equals."""
    return sorted(rates, key=lambda rate: (runs[rung, rate], rate))


def _after(count: int, rung: int) -> list[int]:
    """Rungs of the runs that follow once ``count`` rates have run ``rung``."""
    later: list[int] = []
    for following in range(rung + 1, len(RUNGS)):
        count = (count + 1) // 2
        if count == 1:
            break
        later += [following] * count
    return later


def _rounded(rate: float) -> float:
    return float(f"{rate:.6g}")
