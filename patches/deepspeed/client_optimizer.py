"""One of noflush's rules in place of the optimizer that a script builds itself and passes to `deepspeed.initialize`.

GPT-NeoX, Megatron-DeepSpeed and others build their own, and DeepSpeed lets it win over the config's. The rule takes
over its parameter groups; the script's schedule goes on to set their learning rate and weight decay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from noflush.config import ConfigError
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.methods.table import load
from noflush.patches.deepspeed.config_faults import flattened_by
from noflush.patches.deepspeed.optimizers import refusal_of_class

logger = logging.getLogger("noflush")
_GROUP_KEYS = ("params", "name", "lr", "initial_lr", "lr_mult", "lr_scale", "weight_decay", "wd_mult")
"""Of the script's parameter groups: its own marks, and what its schedule sets; the rest is its optimizer's."""


def with_rule(kwargs: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """``kwargs`` of an engine with the rule that ``section`` names (``{"type": ..., "params": {...}}``).

    The script's optimizer may be one, or a function that makes one out of parameters, as DeepSpeed takes it.

    Raises:
        ConfigError: the script's optimizer has made updates already, or its schedule does not say whose it is.
        ValueError: a parameter of the rule is out of range.
    """
    theirs, schedule = kwargs["optimizer"], kwargs.get("lr_scheduler")
    if not isinstance(theirs, Optimizer):
        make: Callable[[Any], Optimizer] = theirs
        return {**kwargs, "optimizer": lambda params: _rule_for(make(params), section)}
    ours = _rule_for(theirs, section)
    if schedule is not None and (isinstance(schedule, type) or not callable(schedule)):
        if getattr(schedule, "optimizer", None) is not theirs:
            raise ConfigError(
                [
                    f"{type(schedule).__name__} has no attribute 'optimizer' that is the script's "
                    f"{type(theirs).__name__}, so it cannot be given {type(ours).__name__} instead: pass a function "
                    "that makes the schedule out of an optimizer as lr_scheduler"
                ]
            )
        _hand_over(schedule, theirs, ours)
    return {**kwargs, "optimizer": ours}


def check_whole(theirs: Any, ds_config: Mapping[str, Any]) -> None:
    """Raises ConfigError if a script's optimizer sees whole matrices and would be handed flat pieces of many."""
    why = refusal_of_class(type(theirs).__name__, flattened_by(ds_config))
    if why and not isinstance(theirs, DelayAwareOptimizer):
        raise ConfigError([f"the script's {type(theirs).__name__}: {why}"])


def _hand_over(schedule: Any, theirs: Any, ours: Optimizer) -> None:
    """Has ``schedule``, and those that it is made of, set the rates of ``ours``.

    torch's and DeepSpeed's keep lists with a number a group; a rule of matrices makes two groups out of one.
    """
    schedule.optimizer = ours
    number = {id(p): i for i, group in enumerate(theirs.param_groups) for p in group["params"]}
    origins = [number[id(group["params"][0])] for group in ours.param_groups]
    for name, value in list(vars(schedule).items()):
        if isinstance(value, list) and len(value) == len(theirs.param_groups) and ("lr" in name or "mom" in name):
            setattr(schedule, name, [value[origin] for origin in origins])
    for part in getattr(schedule, "_schedulers", ()):
        _hand_over(part, theirs, ours)


def _rule_for(theirs: Optimizer, section: Mapping[str, Any]) -> Optimizer:
    if theirs.state:
        raise ConfigError(
            [
                f"{section['type']} takes the place of the script's {type(theirs).__name__}, which has made updates "
                "already: hand it over before the first step"
            ]
        )
    params = {k: v for k, v in (section.get("params") or {}).items() if k not in ("lr", "weight_decay")}
    groups = [{k: v for k, v in group.items() if k in _GROUP_KEYS} for group in theirs.param_groups]
    # Each group has its own; the defaults are for groups that are added later.
    shared = {key: theirs.defaults[key] for key in ("lr", "weight_decay") if key in theirs.defaults}
    rule: Any = load(section["type"])
    ours: Optimizer = rule(groups, **shared, **params)
    logger.info(
        "noflush: %s in place of the script's %s.%s, for %d parameter groups and their schedule",
        type(ours).__name__, type(theirs).__module__, type(theirs).__qualname__, len(groups),
    )  # fmt: skip
    return ours
