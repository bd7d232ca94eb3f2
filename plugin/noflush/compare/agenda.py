"""Which trials are to run next, given those that have: searches, then the seeds, then the shorter runs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from noflush.compare.contestants import Contestant
from noflush.compare.halving import RUNGS, Standing, standing
from noflush.compare.settings import LEAST_UPDATES, SEARCH_SEED, Record, Task, Trial
from noflush.order.schedule import Schedule
from noflush.order.timing import Cost, play

Find = Callable[[Trial], Record | None]


@dataclass(frozen=True)
class Plan:
    """A comparison: everyone at every P, from seeds 1 to ``seeds``.

    Attributes:
        updates: of a reported run.
        search_updates: of the longest rung of a search.
    """

    contestants: tuple[Contestant, ...]
    stages: tuple[int, ...]
    seeds: int
    updates: int
    search_updates: int

    def search(self, contestant: Contestant, stages: int, find: Find) -> tuple[Standing, list[Trial]]:
        """Where the search of a contestant at P ``stages`` stands, and its trials that ``find`` has."""
        runs: dict[tuple[int, float], float] = {}
        made: list[Trial] = []
        while True:
            now = standing(contestant.rates, runs)
            known = {place: find(self._rung(contestant, stages, *place)) for place in now.wanted}
            fresh = {place: record.loss for place, record in known.items() if record is not None}
            if not fresh:
                return now, made
            runs |= fresh
            made += [self._rung(contestant, stages, *place) for place in fresh]

    def rungs(self, contestant: Contestant, stages: int, now: Standing) -> list[Trial]:
        """The trials that a search wants."""
        return [self._rung(contestant, stages, *place) for place in now.wanted]

    def _rung(self, contestant: Contestant, stages: int, rung: int, lr: float) -> Trial:
        return Trial(contestant, stages, SEARCH_SEED, lr, rung_updates(self.search_updates, rung), "search")

    def reported(self, contestant: Contestant, stages: int, lr: float) -> list[Trial]:
        """The trials of all seeds at the learning rate found."""
        return [Trial(contestant, stages, seed, lr, self.updates, "report") for seed in range(1, self.seeds + 1)]

    def short(self, contestant: Contestant, stages: int, lr: float, gas: int) -> list[Trial]:
        """Of a synchronous contestant, runs of as many updates as it makes while the others make all of theirs.

        None where that is everything, or too little for a run of its own.
        """
        updates = round(self.updates * speed_of_flush(stages, gas))
        if not contestant.synchronous or not LEAST_UPDATES <= updates < self.updates:
            return []
        return [Trial(contestant, stages, seed, lr, updates, "report") for seed in range(1, self.seeds + 1)]


def rung_updates(longest: int, rung: int) -> int:
    """Updates of a rung's runs."""
    return round(longest * RUNGS[rung])


def speed_of_flush(stages: int, gas: int) -> float:
    """Updates a synchronous pipeline makes in the time of one without the flush: 1 / (1 + (P-1) / K), as played."""
    with_flush, without = Schedule(stages, gas, "1f1b_flush"), Schedule(stages, gas)
    return seconds_per_update(without, 1.0) / seconds_per_update(with_flush, 1.0)


@cache
def seconds_per_update(schedule: Schedule, stage_seconds: float) -> float:
    """Of a pipeline whose stages take ``stage_seconds`` a micro-batch, backward twice forward; links cost nothing."""
    cost = Cost(stage_seconds / 3, stage_seconds * 2 / 3)
    return play(schedule, [cost] * schedule.stages).seconds_per_call


@dataclass(frozen=True)
class Agenda:
    """Trials that can run ``now``, the work of ``later`` ones that wait for them, and the work ``done``."""

    now: tuple[Trial, ...]
    later: int
    done: int


def agenda(plan: Plan, task: Task, find: Find) -> Agenda:
    """What is left of ``plan``; work is counted as `Trial.work` does."""
    now: list[Trial] = []
    later = done = 0
    for stages in plan.stages:
        for contestant in plan.contestants:
            search, made = plan.search(contestant, stages, find)
            done += sum(trial.work(task) for trial in made)
            lr = contestant.rates[0] if search.winner is None else search.winner
            rest = [*plan.reported(contestant, stages, lr), *plan.short(contestant, stages, lr, task.gas)]
            if search.winner is None:
                now += plan.rungs(contestant, stages, search)
                later += sum(_work(task, stages, rung_updates(plan.search_updates, rung)) for rung in search.later)
                later += sum(trial.work(task) for trial in rest)
                continue
            missing = [trial for trial in rest if find(trial) is None]
            now += missing
            done += sum(trial.work(task) for trial in rest if trial not in missing)
    return Agenda(tuple(unique(now, task)), later, done)


def _work(task: Task, stages: int, updates: int) -> int:
    return updates * task.gas * (task.blocks(stages) + 1)


def unique(trials: Sequence[Trial], task: Task) -> list[Trial]:
    """``trials`` without those whose numbers another's are."""
    return list({trial.key(task): trial for trial in reversed(trials)}.values())[::-1]
