"""Who runs in the paper's setting: optimizer, schedule and weights, and the learning rate to start from. Pure."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

ITERATIONS = 50_000
"""Of the paper; lengths below are for as many, and shrink with them."""
_DISCOUNT = 7_000
_NADAM = {"eps": 1e-8, "momentum_decay": 0.004, "momentum_schedule": "nadam"}
# The authors' form without a stash computes every forward anew, by the live weights.
_RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform")
PAPERS_LR = 3e-4
MUONS_LR = 1.5e-3


@dataclass(frozen=True)
class Contestant:
    """One row of the result.

    Attributes:
        name: of its folder, and in --only, --lr and --tune.
        says: what it is.
        optimizer: ``type`` of the DeepSpeed config.
        params: of it, without learning rate and decay.
        lr: to start from.
        lr_is: where that comes from.
        flush: with the flush, so without delay.
        weights: policy without the flush.
        discount: iterations of Eq 13's ``lr_discount_steps``, of `ITERATIONS`; 0 for none.
        arguments: of the launcher, for it alone.
    """

    name: str
    says: str
    optimizer: str
    lr: float
    lr_is: str
    params: dict = field(default_factory=dict)
    flush: bool = False
    weights: str = "stash"
    discount: int = 0
    arguments: tuple[str, ...] = ()


_PAPERS = "the paper's"
_NOT_TUNED = "the paper's for the asynchronous runs; not tuned for this one"
_START = "a start value: untuned"

CONTESTANTS = (
    Contestant("adamw-flush", "AdamW, synchronous", "PipeDreamAdamW", PAPERS_LR, _NOT_TUNED, flush=True),
    Contestant(
        "nadam-flush",
        "NAdam .99, synchronous",
        "DelayAwareNAdamW",
        PAPERS_LR,
        _NOT_TUNED,
        {"betas": [0.99, 0.999], **_NADAM},
        flush=True,
    ),
    Contestant("pipedream", "PipeDream: AdamW, stash", "PipeDreamAdamW", PAPERS_LR, _PAPERS),
    Contestant(
        "nadam",
        "the paper's NAdam .99, stash",
        "DelayAwareNAdamW",
        PAPERS_LR,
        _PAPERS,
        {"betas": [0.99, 0.999], **_NADAM},
    ),
    Contestant(
        "nadam-latest",
        "the paper's without a stash (Eq 13)",
        "DelayAwareNAdamW",
        PAPERS_LR,
        _PAPERS,
        {"betas": [0.9, 0.999], **_NADAM, "stage_momentum": True},
        weights="latest",
        discount=_DISCOUNT,
        arguments=_RECOMPUTE,
    ),
    Contestant("muon-flush", "Muon, synchronous", "DelayAwareMuon", MUONS_LR, _START, flush=True),
    Contestant("muon", "Muon looking ahead .9, stash", "DelayAwareMuon", MUONS_LR, _START, {"look_ahead": 0.9}),
    Contestant(
        "muon-latest",
        "Muon looking ahead .9, no stash",
        "DelayAwareMuon",
        MUONS_LR,
        _START,
        {"look_ahead": 0.9},
        weights="latest",
    ),
)
NAMES = tuple(one.name for one in CONTESTANTS)


def chosen(names: Sequence[str]) -> tuple[Contestant, ...]:
    """The contestants named, in the table's order; all for no name. Raises ValueError for one that is not there."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"{' '.join(unknown)}: no such contestant; there are {', '.join(NAMES)}")
    return tuple(one for one in CONTESTANTS if not names or one.name in names)


def config_of(one: Contestant, papers: dict, iterations: int) -> dict:
    """The DeepSpeed config of ``one``: the ``papers`` with another optimizer, schedule and weights.

    ``iterations``: of the run; what is as long as the paper has it shrinks with them.
    """
    config = copy.deepcopy(papers)
    params = copy.deepcopy(one.params)
    if one.discount:
        params["lr_discount_steps"] = scaled(one.discount, iterations)
    config["optimizer"] = {"type": one.optimizer, "params": params}
    schedule = "1f1b_flush" if one.flush else "1f1b_no_flush"
    config["async_pipeline"] |= {"schedule": schedule, "weights": one.weights}
    return config


def scaled(length: int, iterations: int) -> int:
    """A ``length`` in iterations that the paper has for `ITERATIONS`, for a run of ``iterations``; 1 or more."""
    return max(1, length * iterations // ITERATIONS)
