"""What a checkpoint's files have of each parameter: weights, state of its optimizer, rate, by names.

Read from all old stages' files and all their replicas' shards; of another number of tensor-parallel slices from all of
them, and divided anew as the module's `slice_rule` says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noflush.patches.deepspeed.slice_rule import resliced, rule_of, shape_among
from noflush.patches.deepspeed.universal import own_state
from noflush.patches.deepspeed.whole_matrices import GAP
from noflush.stage.checkpoint import CheckpointError

PARAMETERS = "noflush_parameters"
"""In DeepSpeed's file of a stage: names of the parameters of an optimizer that numbers them."""
SPANS = "noflush_state_spans"
"""In DeepSpeed's file of a stage: `matrix_state.spans_of` its parameters."""


@dataclass
class Kept:
    """What a checkpoint has of one parameter: its float32 weights, state of its optimizer, and its group's rate."""

    master: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    rate: float = 0.0


def stage_file(folder: Path, part: int) -> Path:
    return folder / f"mp_rank_{part:02d}_model_states.pt"


def shards_of(folder: Path, part: int) -> list[Path]:
    """ZeRO's files of a stage, in the order of the replicas."""
    found = folder.glob(f"*zero_pp_rank_*_mp_rank_{part:02d}_optim_states.pt")
    return sorted(found, key=lambda path: int(re.findall(r"zero_pp_rank_(\d+)_", path.name)[0]))


def read(path: Path) -> dict[str, Any]:
    # Mapped: of other stages' parameters nothing is read but where they lie.
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    return found


def collect(folder: Path, part: int) -> dict[str, Kept]:
    """What the files of one old stage have of its parameters."""
    kept: dict[str, Kept] = {}
    shards = shards_of(folder, part)
    if not shards:
        file = read(stage_file(folder, part))
        names = file.get(PARAMETERS)
        if names is None:
            raise CheckpointError(
                f"checkpoint {folder} does not say which parameter each of its optimizer's states is of: it was "
                "written by stock DeepSpeed or an older noflush; load it with as many stages and save it, or take its "
                "weights alone (load_module_only=True)"
            )
        rates = {n: group["lr"] for group in file["optimizer"]["param_groups"] for n in group["params"]}
        for number, state in file["optimizer"]["state"].items():
            kept[names[number]] = Kept(None, dict(state), rates[number])
        return kept
    spans = read(stage_file(folder, part)).get(SPANS, {})
    for shard in shards:
        of_shard = read(shard)["optimizer_state_dict"]
        state, groups = of_shard["base_optimizer_state"]["state"], of_shard["base_optimizer_state"]["param_groups"]
        masters = of_shard["single_partition_of_fp32_groups"]
        paddings = of_shard.get("group_paddings") or [0] * len(masters)
        for group, (master, pieces) in enumerate(zip(masters, of_shard["param_slice_mappings"], strict=True)):
            # ZeRO saves masters without the padding at their end, and state with it.
            as_weights = (master.numel(), master.numel() + paddings[group])
            for name, piece in pieces.items():
                if name.startswith(GAP):
                    continue
                found = kept.setdefault(name, Kept(rate=groups[group]["lr"]))
                found.master = _join(found.master, master, piece)
                for key, value in own_state(state[group]).items():
                    if value.dim() == 0:
                        found.state[key] = value
                    elif key in spans.get(name, {}):
                        found.state[key] = value.view(-1)[slice(*spans[name][key])]
                    elif value.numel() in as_weights:
                        found.state[key] = _join(found.state.get(key), value, piece)
                    else:
                        raise CheckpointError(
                            f"checkpoint {folder}: {key} of {name} lies in a shard by matrices, and an older noflush "
                            "did not write down where: go on with the same stages, layers of each and replicas"
                        )
    return kept


def divided_anew(engine: Any, of_slices: list[dict[str, Kept]], folder: Path) -> dict[str, Kept]:
    """What this rank's slice has of ``of_slices``, all slices of one old stage: of its own parameters only."""
    grid, rule = engine.grid, rule_of(engine.module)
    assert rule is not None, "`other_shape` refuses"
    rank, count = grid.get_slice_parallel_rank(), grid.get_slice_parallel_world_size()
    own = {engine.param_names[p]: p.shape for layout in engine.pipeline_stage.weights.layouts for p in layout.params}
    kept: dict[str, Kept] = {}
    for name in own.keys() & of_slices[0].keys():
        parts = [one[name] for one in of_slices]
        shape = shape_among(rule, name, own[name], count, len(parts))

        def anew(slices: list[Tensor], key: str, name: str = name, shape: torch.Size = shape) -> Tensor:
            if any(part.numel() != shape.numel() for part in slices):
                raise CheckpointError(
                    f"checkpoint {folder}: {key} of {name} is of the matrices that its {len(slices)} tensor-parallel "
                    f"slices had, and cannot be divided into {count}; go on with as many"
                )
            return resliced(rule, name, [part.view(shape) for part in slices], rank, count)

        masters = [part.master for part in parts if part.master is not None]
        state = {
            key: anew([part.state[key] for part in parts], key) if value.dim() else value
            for key, value in parts[0].state.items()
        }
        kept[name] = Kept(anew(masters, "the weight") if masters else None, state, parts[0].rate)
    return kept


def _join(before: Tensor | None, flat: Tensor, piece: Any) -> Tensor:
    part = flat.view(-1).narrow(0, piece.start, piece.numel)
    return part if before is None else torch.cat([before, part])
