"""Who takes part in a comparison: an update rule, the schedule it runs under, learning rates to search. Pure."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from noflush.methods.table import METHODS
from noflush.order.policies import POLICIES, PolicyName
from noflush.order.schedule import Schedule, ScheduleName

ADAMW = "PipeDreamAdamW"
"""The optimizer whose synchronous rows every other row is measured against."""
BASELINE = "sync-adamw"
"""The row that takes part always."""


def geometric(first: float, count: int = 4, ratio: float = 2.0) -> tuple[float, ...]:
    """``count`` learning rates from ``first``, each ``ratio`` times the one before, to six digits."""
    return tuple(float(f"{first * ratio**i:.6g}") for i in range(count))


@dataclass(frozen=True)
class Contestant:
    """A row of a comparison.

    Attributes:
        name: unique, in tables and files.
        optimizer: its row in `table.METHODS`.
        params: its hyper-parameters but ``lr``; those left out have the row's defaults.
        rates: learning rates to search, rising.
        says: one line for the reader.
        schedule: ``1f1b_no_flush`` (asynchronous) or ``1f1b_flush`` (synchronous).
        weights: the policy; of no effect under the flush.
        twin: the synchronous row that comes with it, or none.
    """

    name: str
    optimizer: str
    params: Mapping[str, Any]
    rates: tuple[float, ...]
    says: str
    schedule: ScheduleName = "1f1b_no_flush"
    weights: PolicyName = "stash"
    twin: str | None = field(default=None, compare=False)

    @property
    def synchronous(self) -> bool:
        """Whether it pays the flush and sees no delay."""
        return self.schedule == "1f1b_flush"

    def plan(self, stages: int, gas: int) -> Schedule:
        """Its schedule at P ``stages`` and K ``gas``. Raises ValueError where its policy cannot work there."""
        try:
            return Schedule(stages, gas, self.schedule, self.weights)
        except ValueError as error:
            raise ValueError(f"contestant {self.name!r} at {stages} stages: {error}") from error


def _both(
    sync: str,
    name: str,
    optimizer: str,
    params: Mapping[str, Any],
    says: str,
    lr: float,
    sync_lr: float,
) -> list[Contestant]:
    """A method's two rows; they search four learning rates from ``lr`` and ``sync_lr``: delay wants smaller ones."""
    return [
        Contestant(sync, optimizer, params, geometric(sync_lr), f"{says}, with the flush", "1f1b_flush"),
        Contestant(name, optimizer, params, geometric(lr), f"{says}, without the flush", twin=sync),
    ]


_MUON, _SOAP = "DelayAwareMuon", "DelayAwareSOAP"
_NADAM = {"betas": (0.99, 0.999)}
_AHEAD = {"look_ahead": 0.9}
_ROWS = [
    *_both("sync-adamw", "pipedream", ADAMW, {}, "AdamW (.9, .999)", 5e-4, 1e-3),
    *_both("sync-nadam", "nadam", "DelayAwareNAdamW", _NADAM, "NAdamW (.99, .999)", 5e-4, 1e-3),
    *_both("sync-nag", "nag", "DelayAwareNAG", {}, "Nesterov's gradient (.99)", 4e-2, 4e-2),
    *_both("sync-muon", "muon", _MUON, {}, "Muon (.9)", 1e-3, 1e-3),
    *_both("sync-soap", "soap", _SOAP, {}, "SOAP (.9, .999)", 5e-4, 1e-3),
    Contestant(
        "nadam-ahead",
        "DelayAwareNAdamW",
        {**_NADAM, **_AHEAD},
        geometric(2.5e-4),
        "NAdamW, looking ahead",
        twin="sync-nadam",
    ),
    Contestant("adamw-ahead", ADAMW, _AHEAD, geometric(5e-4), "AdamW looking ahead", twin="sync-adamw"),
    Contestant("muon-ahead", _MUON, _AHEAD, geometric(1e-3), "Muon (.9) looking ahead", twin="sync-muon"),
    Contestant("soap-ahead", _SOAP, _AHEAD, geometric(5e-4), "SOAP looking ahead", twin="sync-soap"),
    Contestant(
        "muon-ahead-latest",
        _MUON,
        _AHEAD,
        geometric(1e-3),
        "muon-ahead without a stash",
        weights="latest",
        twin="sync-muon",
    ),
]
CONTESTANTS: dict[str, Contestant] = {row.name: row for row in _ROWS}
"""Every row that has a name."""
_ALSO = {"adamw": "pipedream"}
"""Methods by another name than their asynchronous row's."""


def chosen(names: Sequence[str], given: Sequence[str] = ()) -> list[Contestant]:
    """The rows called ``names`` with their synchronous twins, `BASELINE` first, then ``given``, each as JSON.

    Raises ValueError for a name that no row has, one given twice, and JSON that is no contestant.
    """
    unknown = [name for name in names if _ALSO.get(name, name) not in CONTESTANTS]
    if unknown:
        known = ", ".join([*_ALSO, *CONTESTANTS])
        raise ValueError(f"--methods {','.join(unknown)}: no such contestant; they are {known}; or give --contestant")
    wanted = [BASELINE]
    for name in names:
        row = CONTESTANTS[_ALSO.get(name, name)]
        wanted += [row.name] if row.twin is None else [row.twin, row.name]
    rows = [CONTESTANTS[name] for name in dict.fromkeys(wanted)]
    for text in given:
        row = contestant(text)
        if row.name in CONTESTANTS or row.name in [other.name for other in rows]:
            raise ValueError(f"--contestant: the name {row.name!r} is taken; give another")
        rows.append(row)
    return rows


_KEYS = ("name", "optimizer", "schedule", "weights", "rates", "says")


def contestant(text: str) -> Contestant:
    """A contestant from JSON: ``name``, ``optimizer`` as in a DeepSpeed config, ``schedule``, ``weights``, ``rates``.

    Without ``rates`` it searches four from a fourth of the optimizer's default to twice it. Raises ValueError with
    everything that is wrong.
    """
    try:
        read = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--contestant {text}: not JSON ({error})") from error
    section = read.get("optimizer") if isinstance(read, dict) else None
    if not isinstance(section, dict) or not isinstance(read.get("name"), str) or not read["name"]:
        raise ValueError(
            f'--contestant {text}: give {{"name": "mine", "optimizer": {{"type": "DelayAwareNAdamW", "params": {{}}}}}}'
        )
    kind, params = section.get("type"), section.get("params", {})
    faults = [f"{key} is not a key of it: they are {', '.join(_KEYS)}" for key in read if key not in _KEYS]
    if kind not in METHODS:
        faults.append(f"optimizer.type is {kind!r}: it must be one of {', '.join(METHODS)}")
    elif not isinstance(params, dict):
        faults.append(f"optimizer.params is {params!r}: it must be an object")
    else:
        faults += METHODS[kind].faults(params)
    if isinstance(params, dict) and "lr" in params:
        faults.append('lr is searched: give "rates", a list of learning rates, instead')
    for key, allowed in (("schedule", get_args(ScheduleName)), ("weights", tuple(POLICIES))):
        if key in read and read[key] not in allowed:
            faults.append(f"{key} is {read[key]!r}: it must be one of {', '.join(allowed)}")
    rates = read.get("rates")
    if rates is not None and not _are_rates(rates):
        faults.append(f"rates is {rates!r}: it must be a list of numbers above 0, each larger than the one before")
    if faults:
        raise ValueError(f"--contestant {read['name']}: " + "; ".join(faults))
    return Contestant(
        name=read["name"],
        optimizer=str(kind),
        params=params,
        rates=tuple(map(float, rates)) if rates else geometric(METHODS[str(kind)].params["lr"].default / 4),
        says=str(read.get("says", kind)),
        schedule=read.get("schedule", "1f1b_no_flush"),
        weights=read.get("weights", "stash"),
    )


def _are_rates(rates: Any) -> bool:
    if not isinstance(rates, list) or not rates:
        return False
    numbers = all(isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0 for rate in rates)
    return numbers and all(a < b for a, b in itertools.pairwise(rates))
