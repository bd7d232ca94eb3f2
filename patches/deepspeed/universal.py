"""Universal checkpoints of optimizers that keep a momentum alone, as Muon does.

DeepSpeed's converter (`ds_to_universal`, `extract_zero_shards`) reads of every parameter group ``exp_avg``,
``exp_avg_sq`` and the step, and drops all else. So ZeRO's files say the momentum under both names beside its own: one
storage, no byte more on the disk. Adam's two moments are never equal, so that what comes back equal is a momentum, and
no other rule takes it for its own (Adam's own code would take the root of negative numbers and stop at not-a-number).
State of other shapes than the weights', as SOAP's bases, has no place in that format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from noflush.methods.matrices import is_gap
from noflush.methods.optimizer import DelayAwareOptimizer

_MOMENTUM = "momentum_buffer"
_READ = ("exp_avg", "exp_avg_sq")
_GROUPS = (
    "a universal checkpoint has the parameter groups of the first stage that was saved, for all stages (matrices are "
    "one group, all else is another)"
)
_INSTEAD = "load the checkpoint that it was made of, which is re-cut by layer"


@contextlib.contextmanager
def momenta_as_moments(rule: Any) -> Iterator[None]:
    """Within, the ``state_dict`` of ``rule`` has each momentum under the converter's two names too."""
    if not isinstance(rule, DelayAwareOptimizer):
        yield
        return
    with rule.register_state_dict_post_hook(_add):
        yield


def _add(_: Any, saved: dict[str, Any]) -> None:
    # A copy: the entries are the optimizer's own.
    saved["state"] = {
        number: {**state, **dict.fromkeys(_READ, state[_MOMENTUM])} if _MOMENTUM in state else state
        for number, state in saved["state"].items()
    }


def own_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A group's saved ``state`` without the names that `momenta_as_moments` added."""
    return {name: value for name, value in state.items() if _MOMENTUM not in state or name not in _READ}


@contextlib.contextmanager
def loading(rule: Any, groups: Sequence[Sequence[Any]], names: Mapping[Any, str]) -> Iterator[None]:
    """Within, DeepSpeed loads a universal checkpoint into ``rule``; afterwards momenta are momenta again. Collective.

    Args:
        rule: the optimizer; other than noflush's are left to DeepSpeed.
        groups: the model's parameters as ZeRO has them, a list a group.
        names: of the parameters.

    Raises:
        ValueError: on all ranks: the checkpoint's parameter groups are others, or a momentum is what a rule that keeps
            two moments was given.
    """
    if not isinstance(rule, DelayAwareOptimizer):
        yield
        return
    rule.state.clear()
    for group in groups:
        known = next(names[p] for p in group if not is_gap(p))
        for p in filter(is_gap, group):
            p.load_hp_checkpoint_state = partial(_fill_gap, p, known)
    methods = [group.get("method") for group in rule.param_groups]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, methods)
    if any(found != methods for found in everywhere):
        raise ValueError(f"{_GROUPS}, and the stages of this run differ in them; {_INSTEAD}")
    yield
    flats = [group["params"][0] for group in rule.param_groups]
    if not any(rule.state.values()):
        return  # nothing was loaded
    if not all(rule.state[flat] for flat in flats) or methods != [group.get("method") for group in rule.param_groups]:
        raise ValueError(f"{_GROUPS}, and this run has others; {_INSTEAD}")
    for flat, of_rule, group in zip(flats, rule.param_groups, groups, strict=True):
        momenta = {names[p] for p in group if not is_gap(p) and _is_momentum(p)}
        if _MOMENTUM in rule.method_of_group(of_rule).row.state:
            first, second = (rule.state[flat].get(name) for name in _READ)
            if first is not None and second is not None and torch.equal(first, second):
                rule.state[flat][_MOMENTUM] = first
        elif momenta:
            raise ValueError(
                f"the universal checkpoint has a momentum, as Muon keeps it, for {min(momenta)}, which an optimizer "
                "with two moments updates here: name the optimizer that saved it, or take its weights alone "
                "(load_module_only=True)"
            )


def _is_momentum(p: Any) -> bool:
    """Whether what was loaded for ``p`` is one; moments of zero gradients are equal too."""
    found = {} if p._hp_mapping is None else p._hp_mapping.optim_fragment
    first, second = (found.get(name) for name in _READ)
    return first is not None and second is not None and torch.equal(first, second) and bool(first.any())


def _fill_gap(p: Any, known: str, folder: str, *_: Any, **__: Any) -> Any:
    """DeepSpeed's ``load_hp_checkpoint_state`` of a parameter that fills a gap: how long, depends on who saved.

    Returns the step of parameter ``known`` of its group.
    """
    mapping = p._hp_mapping
    mapping.optim_fragment = dict.fromkeys(_READ, torch.zeros_like(mapping.get_hp_fragment()))
    return torch.load(Path(folder).parent / known / "step.pt", weights_only=False)
