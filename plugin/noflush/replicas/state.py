"""What a newcomer is given of a living peer's same stage: true weights, optimizer, schedule, and how far it is.

Tensors, and what JSON can say; no code travels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from noflush.replicas.transport import State
from noflush.replicas.true_weights import TrueWeights
from noflush.stage.stage import Stage


def take(stage: Stage, true: TrueWeights, schedule: Any) -> State:
    """``stage``'s state between two updates; copies in host memory.

    Args:
        true: its weights.
        schedule: the learning rate's, or None.

    Raises TypeError if a group's option or the schedule has something that JSON cannot say.
    """
    tensors: dict[str, Tensor] = {
        f"weights.{number}": flat.detach().to("cpu", torch.float32, copy=True)
        for number, flat in enumerate(true.flats())
    }
    kept = stage.weights.rule.state_dict()
    values: dict[str, dict[str, Any]] = {}
    for number, state in kept["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"state.{number}.{key}"] = value.detach().to("cpu", copy=True)
            else:
                values.setdefault(str(number), {})[key] = value
    plain = {
        "updates": stage.updates,
        "layout": [layout.numel for layout in stage.weights.layouts],
        "values": values,
        "groups": kept["param_groups"],
        "schedule": None if schedule is None else schedule.state_dict(),
    }
    return tensors, plain


@torch.no_grad()
def put(stage: Stage, true: TrueWeights, schedule: Any, state: State) -> None:
    """Has a drained ``stage`` go on from what `take` gave; numbers of calls are the caller's to set.

    Raises ValueError for the state of a stage that is cut otherwise.
    """
    tensors, plain = state
    here = [layout.numel for layout in stage.weights.layouts]
    if plain["layout"] != here:
        raise ValueError(
            f"stage {stage.stage} has flat weights of {here} elements here and of {plain['layout']} at the group it "
            "joins: all groups must train one model with one configuration, cut into as many stages"
        )
    true.replace([tensors[f"weights.{number}"] for number in range(len(here))])
    entries: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in plain["values"].items()}
    for name, value in tensors.items():
        kind, number, *key = name.split(".", 2)
        if kind == "state":
            entries.setdefault(int(number), {})[key[0]] = value
    stage.weights.rule.load_state_dict({"state": entries, "param_groups": plain["groups"]})
    if schedule is not None and plain["schedule"] is not None:
        if hasattr(schedule, "num_steps"):
            schedule.num_steps = 0  # Megatron's adds what it loads
        schedule.load_state_dict(plain["schedule"])


def position_of(schedule: Any) -> float | None:
    """How far a learning-rate schedule is, in its own steps; None where it does not say."""
    for name in ("num_steps", "last_batch_iteration", "last_epoch"):  # Megatron's, DeepSpeed's, torch's
        if hasattr(schedule, name):
            return float(getattr(schedule, name))
    return None
