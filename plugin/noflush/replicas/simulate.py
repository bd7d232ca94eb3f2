"""Groups of pipelines in one process: what averaging does to the numbers, and the oracle of the engine's.

Each group is a `DelaySimulator`. When a slice was copied and when its average was applied is told (`Exchange`, which
the engine's averager notes); that a group is further than another is no matter but for those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from noflush.order.averaging import Drift, Exchange, smoothing
from noflush.replicas.correction import correction, weighted_average
from noflush.simulate import DelaySimulator


@dataclass
class SimulatedGroup:
    """One group.

    Attributes:
        key: by which exchanges name it.
        simulator: of its pipeline.
        data: its micro-batches, as `DelaySimulator.train_micro_batch` takes them.
        exchanges: of each stage.
        born_of: of a newcomer, stage by stage, the group that it took its state from, and after which update.
        losses: of the micro-batches so far.
    """

    key: str
    simulator: DelaySimulator
    data: Sequence[tuple[Any, Any]]
    exchanges: Sequence[Sequence[Exchange]]
    born_of: Sequence[tuple[str, int]] | None = None
    losses: list[float] = field(default_factory=list)


class GroupsSimulator:
    """Trains groups side by side.

    Args:
        groups: all that ever took part.
        drift: the block's ``replicas.drift``.

    Raises RuntimeError if exchanges wait for one another.
    """

    def __init__(self, groups: Sequence[SimulatedGroup], drift: Drift) -> None:
        self._groups, self._drift = groups, drift
        self._sent: dict[tuple[int, str, int], Tensor] = {}  # stage, group and update
        self._wanted = {
            (stage, part.key, part.update): (exchange.start, exchange.length)
            for group in groups
            for stage, exchanges in enumerate(group.exchanges)
            for exchange in exchanges
            for part in exchange.parts
        }
        self._rates: dict[tuple[int, int, int], Tensor] = {}
        self._visits: Counter[tuple[int, int, int]] = Counter()  # of a group, a stage and a slice
        self._states: dict[tuple[int, int], tuple[int, Any]] = {}  # (newcomer, stage) -> updates, state
        self._waiting = {n for n, group in enumerate(groups) if group.born_of is not None}
        for number, group in enumerate(groups):
            group.simulator.after_update = self._hook(number)

    def run(self) -> None:
        """All groups to the ends of their data."""
        while self._unfinished():
            moved = [self._step(number) for number in range(len(self._groups))]
            if not any(moved):
                raise RuntimeError("the exchanges wait for one another")

    def _unfinished(self) -> bool:
        return any(len(group.losses) < len(group.data) for group in self._groups)

    def _step(self, number: int) -> bool:
        group = self._groups[number]
        if number in self._waiting and not self._born(number, group):
            return False
        if len(group.losses) == len(group.data) or not self._has_all(group):
            return False
        group.losses.append(group.simulator.train_micro_batch(*group.data[len(group.losses)]).item())
        return True

    def _born(self, number: int, group: SimulatedGroup) -> bool:
        stages = group.simulator.schedule.stages
        if any((number, stage) not in self._states for stage in range(stages)):
            return False
        updates = max(self._states[number, stage][0] for stage in range(stages))
        for stage in range(stages):
            group.simulator.put_state(stage, updates, self._states[number, stage][1])
        self._waiting.discard(number)
        return True

    def _has_all(self, group: SimulatedGroup) -> bool:
        """Whether what the updates of the next micro-batch take from other groups is there."""
        following = group.simulator.updates + 1
        return all(
            (stage, part.key, part.update) in self._sent
            for stage, exchanges in enumerate(group.exchanges)
            for exchange in exchanges
            for part in exchange.parts
            if exchange.applied_at == following and part.samples
        )

    def _hook(self, number: int) -> Callable[[int, int], None]:
        def after_update(stage: int, update: int) -> None:
            group = self._groups[number]
            for exchange in group.exchanges[stage]:
                if exchange.applied_at == update:
                    self._apply(number, stage, exchange)
            # What is heard of at an update is applied before the next slice is copied, and before a peer's state.
            if (stage, group.key, update) in self._wanted:
                start, length = self._wanted[stage, group.key, update]
                self._sent[stage, group.key, update] = group.simulator.true_flat(stage)[start : start + length].clone()
            for newcomer, other in enumerate(self._groups):
                if other.born_of is not None and other.born_of[stage] == (group.key, update):
                    self._states[newcomer, stage] = update, group.simulator.state_of(stage)

        return after_update

    def _apply(self, number: int, stage: int, exchange: Exchange) -> None:
        group, parts = self._groups[number], [part for part in exchange.parts if part.samples]
        slices = [self._sent[stage, part.key, part.update] for part in parts]
        average = weighted_average(slices, [part.samples for part in parts])
        assert average is not None
        now = group.simulator.true_flat(stage)[exchange.start : exchange.start + exchange.length]
        change, rate = correction(
            self._drift,
            self._sent[stage, group.key, exchange.sent_at],
            average,
            now,
            self._rates.get((number, stage, exchange.start)),
            exchange.applied_at - exchange.sent_at,
            smoothing(self._visits[number, stage, exchange.start]),
        )
        self._visits[number, stage, exchange.start] += 1
        if rate is not None:
            self._rates[number, stage, exchange.start] = rate
        group.simulator.shift(stage, exchange.start, change)
        group.simulator.step_schedule(stage, exchange.caught_up)
