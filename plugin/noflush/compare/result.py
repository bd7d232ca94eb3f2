"""What a comparison found, at each P a row a contestant. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noflush.compare.agenda import Find, Plan, seconds_per_update, speed_of_flush
from noflush.compare.contestants import ADAMW, Contestant
from noflush.compare.curves import loss_at, mean_curve, tokens_to
from noflush.compare.noise import Difference, Spread, difference, spread
from noflush.compare.settings import Record, Task, Trial
from noflush.order.schedule import Schedule

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class EqualTime:
    """The loss when a pipeline without the flush has seen all tokens.

    Attributes:
        loss: over seeds where a run of that length was made; else without a deviation.
        tokens: that this one has seen by then.
        read_from: ``all`` (it has seen everything), ``own run`` of that length, or ``long curve``.
        curve: (seconds, loss) up to then.
    """

    loss: Spread
    tokens: int
    read_from: str
    curve: Points


@dataclass(frozen=True)
class Against:
    """A row against a synchronous one, ``name``.

    Attributes:
        difference: in final loss, above 0 where this row loses more; None where either diverged.
        tax: tokens to that one's final loss as a share of all; None: not reached.
        matched_at: tokens at which that one's loss was this row's final loss, as a share of all; None: never.
    """

    name: str
    difference: Difference | None
    tax: float | None
    matched_at: float | None


@dataclass(frozen=True)
class Row:
    """A contestant at one P."""

    contestant: Contestant
    lr: float
    lr_at_edge: bool
    losses: Mapping[int, float]
    loss: Spread
    curve: Points
    equal_time: EqualTime
    adamw: Against
    best: Against
    step_ms: float
    pass_ms: float
    skipped: int
    search_tokens: int

    @property
    def update_cost(self) -> float:
        """An update's share of forward and backward."""
        return self.step_ms / self.pass_ms


@dataclass(frozen=True)
class Panel:
    """One P: its rows in the order of contestants, and seconds that all tokens take without the flush and with it."""

    stages: int
    rows: tuple[Row, ...]
    seconds: float
    seconds_of_flush: float


@dataclass(frozen=True)
class _Found:
    lr: float
    at_edge: bool
    search_tokens: int
    seeds: dict[int, Record]
    short: dict[int, Record]
    short_updates: int

    @property
    def losses(self) -> dict[int, float]:
        return {seed: record.loss for seed, record in self.seeds.items()}

    @property
    def curve(self) -> Points:
        return mean_curve([record.curve for record in self.seeds.values()])


def panel(plan: Plan, task: Task, stages: int, find: Find, stage_ms: float) -> Panel:
    """The rows at P ``stages`` once every trial of ``plan`` there has run; a stage takes ``stage_ms`` a micro-batch."""
    found = {one.name: _found(plan, task, one, stages, find) for one in plan.contestants}
    sync = [one for one in plan.contestants if one.synchronous]
    means = {name: spread(list(of.losses.values())).mean for name, of in found.items()}
    best = min(sync, key=lambda one: means[one.name]).name
    adamw = min((one for one in sync if one.optimizer == ADAMW), key=lambda one: means[one.name]).name
    everything = plan.updates * task.tokens_per_update
    rows = []
    for one in plan.contestants:
        mine = found[one.name]
        records = list(mine.seeds.values())
        rows.append(
            Row(
                contestant=one,
                lr=mine.lr,
                lr_at_edge=mine.at_edge,
                losses=mine.losses,
                loss=spread(list(mine.losses.values())),
                curve=mine.curve,
                equal_time=_equal_time(plan, task, one, stages, mine, stage_ms),
                adamw=_against(adamw, mine, found[adamw], everything),
                best=_against(best, mine, found[best], everything),
                step_ms=statistics.median(record.step_ms for record in records),
                pass_ms=statistics.median(record.pass_ms for record in records),
                skipped=sum(record.skipped for record in records),
                search_tokens=mine.search_tokens,
            )
        )
    flush, no_flush = Schedule(stages, task.gas, "1f1b_flush"), Schedule(stages, task.gas)
    seconds, of_flush = (seconds_per_update(one, stage_ms / 1e3) * plan.updates for one in (no_flush, flush))
    return Panel(stages, tuple(rows), seconds, of_flush)


def _found(plan: Plan, task: Task, one: Contestant, stages: int, find: Find) -> _Found:
    search, made = plan.search(one, stages, find)
    assert search.winner is not None, (one.name, search)
    short = plan.short(one, stages, search.winner, task.gas)
    return _Found(
        lr=search.winner,
        at_edge=search.at_edge,
        search_tokens=sum(trial.updates for trial in made) * task.tokens_per_update,
        seeds=_records(plan.reported(one, stages, search.winner), find),
        short=_records(short, find),
        short_updates=short[0].updates if short else 0,
    )


def _records(trials: Sequence[Trial], find: Find) -> dict[int, Record]:
    found = {trial.seed: find(trial) for trial in trials}
    return {seed: record for seed, record in found.items() if record is not None}


def _against(name: str, mine: _Found, other: _Found, everything: int) -> Against:
    """Both curves are read, which are of the same few batches; final losses are of others, and many."""
    goal, own = other.curve[-1][1], mine.curve[-1][1]
    to_goal = tokens_to(mine.curve, goal) if math.isfinite(goal) else None
    matched = tokens_to(other.curve, own) if math.isfinite(own) else None
    return Against(
        name,
        difference(mine.losses, other.losses),
        None if to_goal is None else to_goal / everything,
        None if matched is None else matched / everything,
    )


def _equal_time(plan: Plan, task: Task, one: Contestant, stages: int, mine: _Found, stage_ms: float) -> EqualTime:
    per_update = seconds_per_update(one.plan(stages, task.gas), stage_ms / 1e3)
    per_token = per_update / task.tokens_per_update
    everything = plan.updates * task.tokens_per_update

    def in_time(curve: Points) -> Points:
        return [(tokens * per_token, loss) for tokens, loss in curve]

    share = speed_of_flush(stages, task.gas) if one.synchronous else 1.0
    if share >= 1:
        return EqualTime(spread(list(mine.losses.values())), everything, "all", in_time(mine.curve))
    if mine.short:
        losses = [record.loss for record in mine.short.values()]
        curve = mean_curve([record.curve for record in mine.short.values()])
        return EqualTime(spread(losses), mine.short_updates * task.tokens_per_update, "own run", in_time(curve))
    tokens = share * everything
    loss = loss_at(mine.curve, tokens)
    cut = [*(point for point in mine.curve if point[0] < tokens), (tokens, loss)]
    return EqualTime(Spread(loss, None), round(tokens), "long curve", in_time(cut))


def to_json(panels: Sequence[Panel], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, ready for `json.dump`; losses that are infinite are null."""
    plain: dict[str, Any] = _plain({"settings": settings, "panels": [vars(one) for one in panels]})
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _plain(vars(value)) if hasattr(value, "__dict__") else value
