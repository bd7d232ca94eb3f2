"""DeepSpeed's `TiedLayerSpec` without a flush: which weights are tied, who owns them, and who must not update them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.optim import Optimizer

from noflush.patches.deepspeed.shared_modules import stage_of
from noflush.stage.tied import Tie

Ties = tuple[list[Tie], dict[int, Parameter]]
"""Every tie of the pipeline, and this stage's parameters by number."""


def tied_stages(model: Any) -> dict[str, tuple[int, ...]]:
    """The stages that use each tied layer of a ``PipelineModule``, rising, by its key; of layers on several stages."""
    from deepspeed.pipe import TiedLayerSpec

    found: dict[str, set[int]] = {}
    for index, spec in enumerate(model._layer_specs):
        if isinstance(spec, TiedLayerSpec):
            found.setdefault(spec.key, set()).add(stage_of(model.parts, index))
    return {key: tuple(sorted(stages)) for key, stages in sorted(found.items()) if len(stages) > 1}


def weights_of(model: Any) -> dict[tuple[str, str], Parameter]:
    """This stage's tied weights, by the layer's key and the attribute's (dotted) name."""
    found = {}
    for key, stages in tied_stages(model).items():
        if model.stage_id in stages:
            for attribute in model.tied_weight_attrs[key]:
                found[key, attribute] = reduce(getattr, attribute.split("."), model.tied_modules[key])
    return found


def borrowed(model: Any) -> list[Parameter]:
    """Of them those that an earlier stage owns."""
    stages = tied_stages(model)
    return [weight for (key, _), weight in weights_of(model).items() if stages[key][0] != model.stage_id]


def ties_of(model: Any, group: Any, sums: torch.dtype) -> Ties:
    """What `Stage` takes: every tie of the pipeline, and this stage's parameters by number.

    Collective over ``group``, the pipeline's ranks: stages that use none must know what travels through them.
    ``sums``: in what gradients are added up.
    """
    stages, mine = tied_stages(model), weights_of(model)
    if not stages:
        return [], {}
    told: list[Any] = [None] * model.num_stages
    dist.all_gather_object(told, {of: (tuple(w.shape), w.dtype) for of, w in mine.items()}, group=group)
    known: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]] = {
        of: kind for of_stage in told for of, kind in of_stage.items()
    }
    ties = [Tie(f"{key}.{name}", stages[key], *kind, sums) for (key, name), kind in sorted(known.items())]
    return ties, {number: mine[of] for number, of in enumerate(sorted(known)) if of in mine}


def without(params: Iterable[Any], taken: Iterable[Parameter]) -> list[Any]:
    """Parameters, or groups of them, without those ``taken``; of a group that has no other nothing is left."""
    out = {id(p) for p in taken}
    found = [
        {**p, "params": [q for q in p["params"] if id(q) not in out]} if isinstance(p, dict) else p
        for p in params
        if isinstance(p, dict) or id(p) not in out
    ]
    return [p for p in found if not isinstance(p, dict) or p["params"]]


def disown(optimizer: Optimizer, taken: Iterable[Parameter]) -> None:
    """Takes ``taken`` out of an optimizer that a script has built already."""
    out = {id(p) for p in taken}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in out]
    # DeepSpeed's optimizers of mixed precision flatten each group, and cannot flatten nothing.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
