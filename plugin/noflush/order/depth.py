"""How many more micro-batches in flight hide what links cost: the choice behind ``extra_in_flight: "auto"``. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from noflush.order.policies import ceil_div
from noflush.order.schedule import Schedule
from noflush.order.timing import Cost, Link, play

MOST = 64
"""Largest depth that is chosen by itself: what needs more costs more delay than one should pay without being asked."""
_ENOUGH = 0.005
_RESERVE = 4
"""So many of what is just enough have one more for company: at a depth that is just enough every late message costs."""


@dataclass(frozen=True)
class DepthChoice:
    """A depth, and what it is good for.

    Attributes:
        schedule: with the depth chosen.
        costs, links: by which it was chosen.
        before, after: predicted seconds a call with nothing more in flight, and with that depth.
        bound: seconds a call that compute and bandwidth allow at any depth.
    """

    schedule: Schedule
    costs: tuple[Cost, ...]
    links: tuple[Link, ...]
    before: float
    after: float
    bound: float

    @property
    def extra(self) -> int:
        """The depth chosen: ``extra_in_flight``."""
        return self.schedule.extra_in_flight

    def __str__(self) -> str:
        stages, plain = range(self.schedule.stages), replace(self.schedule, extra_in_flight=0)
        compute = [1e3 * (cost.forward + cost.backward) for cost in self.costs]
        latency = max((link.latency for link in self.links), default=0.0)
        carry = max((max(link.down, link.up) for link in self.links), default=0.0)
        words = (
            f"extra_in_flight auto: {_span(compute)} ms of compute a micro-batch at a stage, links of up to "
            f"{1e3 * latency:.1f} ms one way and {1e3 * carry:.1f} ms a message: {self.extra} more in flight, by "
            f"prediction {1e3 * self.after:.1f} ms a call ({1e3 * self.before:.1f} with none, "
            f"{1e3 * self.bound:.1f} at any depth)"
        )
        if not self.extra:
            return words
        return (
            f"{words}; that is a delay by stage of {[self.schedule.max_delay(s) for s in stages]} updates in place of "
            f"{[plain.max_delay(s) for s in stages]}, and {[self.schedule.versions_alive(s) for s in stages]} weight "
            f"versions in place of {[plain.versions_alive(s) for s in stages]}"
        )


def choose_depth(
    schedule: Schedule, costs: Sequence[Cost], links: Sequence[Link], least: int = 0, most: int = MOST
) -> DepthChoice:
    """The smallest depth that is predicted to come within 0.5 % of what a depth of ``most`` reaches, or of the bound.

    And a quarter more, for links that jitter and machines that hesitate: what is played is never late.

    Args:
        schedule: whose depth is to be chosen; the one it has does not count.
        costs: of a micro-batch, one a stage.
        links: one a link.
        least, most: smallest and largest depth; less where the weight policy or the proof allows less.
    """
    candidates = []
    for extra in range(max(least, most) + 1):
        try:
            candidates.append(replace(schedule, extra_in_flight=extra))
        except ValueError:  # 2bw cannot have more than K in flight; an order may be too long to prove
            break
    played: dict[int, float] = {}

    def seconds(extra: int) -> float:
        if extra not in played:
            played[extra] = play(candidates[extra], costs, links).seconds_per_call
        return played[extra]

    bound = bound_of(schedule, costs, links)
    # A deeper pipeline is not slower: the smallest that is fast enough is found by doubling and halving.
    fits = 0
    while seconds(fits) > bound * (1 + _ENOUGH) and fits < len(candidates) - 1:
        fits = min(max(1, 2 * fits), len(candidates) - 1)
    enough = max(bound, seconds(fits)) * (1 + _ENOUGH)
    too_few = -1
    while fits - too_few > 1:
        middle = (fits + too_few) // 2
        if seconds(middle) <= enough:
            fits = middle
        else:
            too_few = middle
    fits = max(least, min(fits + ceil_div(fits, _RESERVE), len(candidates) - 1))
    return DepthChoice(candidates[fits], tuple(costs), tuple(links), seconds(0), seconds(fits), bound)


def bound_of(schedule: Schedule, costs: Sequence[Cost], links: Sequence[Link]) -> float:
    """Seconds a call at the least: what the slowest stage computes, or the busiest direction of a link carries."""
    compute = max(schedule.gas * (cost.forward + cost.backward) + cost.update for cost in costs)
    return max(compute, *(schedule.gas * max(link.down, link.up) for link in links), 0.0)


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"
