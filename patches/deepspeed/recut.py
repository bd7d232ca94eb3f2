"""A checkpoint of other stages (their number, or which layers each had), replicas or slices, re-cut by layer.

DeepSpeed's files of weights are a layer each, whatever the stages. Optimizer state is read by the names of parameters
(`kept_state`) and put into this run's optimizer. What was in flight is not put back: the pipeline fills anew.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from noflush.methods.matrices import is_gap
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.patches.deepspeed.kept_state import (
    PARAMETERS,
    SPANS,
    Kept,
    collect,
    divided_anew,
    read,
    shards_of,
    stage_file,
)
from noflush.patches.deepspeed.matrix_state import rows_in_shard
from noflush.patches.deepspeed.slice_rule import rule_of
from noflush.patches.deepspeed.whole_matrices import GAP
from noflush.stage.checkpoint import CheckpointError
from noflush.stage.layout import FlatLayout

logger = logging.getLogger("noflush")

PARTS = "noflush_parts"
"""In DeepSpeed's file of a stage: where the module was cut, as its ``parts``."""
ORDER = "noflush_order"
"""In the same: how far a replica group was in the order of samples that it shares with others."""
# What DeepSpeed keeps to itself of such a file; the rest is the script's.
_OWN = {
    *("module", "optimizer", "lr_scheduler", "sparse_tensor_module_names", "skipped_steps", "global_steps"),
    *("dp_world_size", "mp_world_size", "data_sampler", "random_ltd", PARAMETERS, PARTS, ORDER, SPANS),
}


@dataclass(frozen=True)
class Shape:
    """How a run was split when it wrote a checkpoint.

    Attributes:
        replicas: 0 where no file depends on their number.
        parts: where its list of layers was cut, as `PipelineModule.parts`; None if the checkpoint does not say.
    """

    stages: int
    slices: int
    replicas: int
    parts: tuple[int, ...] | None = None


def shape_of(folder: Path) -> Shape | None:
    """The shape of the checkpoint in ``folder``; None if there is none of a pipeline."""
    parts = len(list(folder.glob("mp_rank_*_model_states.pt")))
    layers = list(folder.glob("layer_*-model_states.pt"))
    slices = max(1, len({m[1] for f in layers if (m := re.search(r"-model_(\d+)-model_states", f.name))}))
    if not layers or parts < slices:  # weights alone, which launch/convert_checkpoint.py imports, have one part
        return None
    shards = [int(m[1]) for f in shards_of(folder, 0) if (m := re.search(r"zero_pp_rank_(\d+)_", f.name))]
    cut = read(first).get(PARTS) if (first := stage_file(folder, 0)).is_file() else None
    return Shape(parts // slices, slices, max(shards, default=-1) + 1, None if cut is None else tuple(cut))


def other_shape(engine: Any, folder: Path) -> Shape | None:
    """The shape of the checkpoint in ``folder``, where it must be re-cut for this run; else None. Collective.

    Raises CheckpointError if it cannot be re-cut.
    """
    there = shape_of(folder)
    if there is None or engine.use_node_local_storage():  # of which each node sees a part
        return None
    slices = engine.grid.get_slice_parallel_world_size()
    if there.slices != slices:
        if rule_of(engine.module) is None:
            raise CheckpointError(
                f"checkpoint {folder} is of {there.slices} tensor-parallel slices, and this run has {slices}, of a "
                "module that does not say how its weights are divided into them (slice_rule of a CutPipelineModule): "
                "go on with as many"
            )
        return there
    same_replicas = there.replicas in (0, engine.dp_world_size)
    alike = there.stages == engine.num_stages and same_replicas and _cut_alike(engine.module.parts, folder, there)
    return None if alike and _shared_alike(engine, folder) else there


def _shared_alike(engine: Any, folder: Path) -> bool:
    """Whether every replica's shard has the parameters that it had, in the same places. Collective.

    DeepSpeed loads a shard by place. Another release may share matrices out otherwise.
    """
    shards, replica = shards_of(folder, engine.grid.get_model_parallel_rank()), engine.grid.get_data_parallel_rank()
    mine = True
    if replica < len(shards) and engine.pipeline_stage.weights.has_masters:  # what is missing DeepSpeed says
        saved = read(shards[replica])["optimizer_state_dict"].get("param_slice_mappings")
        there = _places(saved or [])
        names = engine.param_names
        known = {*names.values()}  # a script may have renamed its layers: DeepSpeed goes by places
        mine = not {*there} <= known or there == _places(engine.optimizer._param_slice_mappings)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    return all(everywhere)


def _places(mappings: list[Any]) -> dict[str, tuple[int, int, int]]:
    """By name of a parameter: its group, and where in the shard it lies."""
    return {
        name: (group, piece.start, piece.numel)
        for group, pieces in enumerate(mappings)
        for name, piece in pieces.items()
        if not name.startswith(GAP)
    }


def _how_cut(engine: Any, there: Shape) -> str:
    words = f"{there.stages} stages" + f" of {there.replicas} replicas" * bool(there.replicas)
    if there.slices != engine.grid.get_slice_parallel_world_size():
        return f"{words} and {there.slices} tensor-parallel slices"
    if there.stages != engine.num_stages:
        return words
    if there.parts != tuple(engine.module.parts):
        return f"{words} that had other layers"
    return f"{words} that shared matrices out otherwise" if there.replicas == engine.dp_world_size else words


def _cut_alike(parts: list[int], folder: Path, there: Shape) -> bool:
    """Whether the stages ``there``, as many as here, had the layers that they have with ``parts``.

    A checkpoint that does not say where it was cut, of stock DeepSpeed or an older noflush, may name the parameters of
    every stage, of which those in no tie begin with their layer's number.
    """
    if there.parts is not None:
        return list(there.parts) == parts
    for stage in range(there.stages):
        file = read(stage_file(folder, stage * there.slices))
        names = file.get(PARAMETERS) or [name for group in file.get("param_shapes") or () for name in group]
        layers = {int(name.split(".")[0]) for name in names if name.split(".")[0].isdecimal()}
        if not layers <= {*range(parts[stage], parts[stage + 1])}:
            return False
    return True


def load(engine: Any, folder: Path, there: Shape, strict: bool, with_schedule: bool) -> dict[str, Any]:
    """Loads the checkpoint of shape ``there`` into the drained ``engine``; returns what its script had saved.

    Weights alone DeepSpeed loads into any number of stages itself.

    Args:
        strict: as DeepSpeed's ``load_module_strict``.
        with_schedule: as DeepSpeed's ``load_lr_scheduler_states``.

    Raises:
        CheckpointError: it lacks a parameter's state, or has some that this run's optimizer has otherwise.
    """
    engine.module.load_state_dir(str(folder), strict=strict, checkpoint_engine=engine.checkpoint_engine)
    sliced_alike = there.slices == engine.grid.get_slice_parallel_world_size()
    wanted = [engine.grid.get_slice_parallel_rank()] if sliced_alike else range(there.slices)
    parts = [stage * there.slices + wanted[0] for stage in range(there.stages)]
    kept: dict[str, Kept] = {}
    for stage in range(there.stages):
        of_slices = [collect(folder, stage * there.slices + number) for number in wanted]
        # Of a tied module's own parameters the first stage's are in use; the others' have the same names.
        kept = (of_slices[0] if sliced_alike else divided_anew(engine, of_slices, folder)) | kept
    _fill(engine, kept, folder)
    first, last = read(stage_file(folder, parts[0])), read(stage_file(folder, parts[-1]))
    if with_schedule and engine.lr_scheduler is not None and last.get("lr_scheduler") is not None:
        # The last stage has made an update a call: its schedule stands where the run does.
        engine.lr_scheduler.load_state_dict(last["lr_scheduler"])
    shards = shards_of(folder, parts[-1])
    if engine.fp16_enabled() and shards:
        saved = read(shards[0])["optimizer_state_dict"]["loss_scaler"]
        if type(saved) is type(engine.optimizer.loss_scaler):  # dynamic or not, as this run's
            engine.optimizer.loss_scaler = saved
    engine.global_steps, engine.skipped_steps = first["global_steps"], first["skipped_steps"]
    engine.global_samples = first.get("global_samples", first["global_steps"] * engine.train_batch_size())
    if engine.global_rank == 0:
        logger.warning(
            "noflush: %s was written by %s: re-cut by layer for %d stages of %d; the pipeline fills anew",
            folder, _how_cut(engine, there), engine.num_stages, engine.dp_world_size,
        )  # fmt: skip
    return {key: value for key, value in first.items() if key not in _OWN}


@torch.no_grad()
def _fill(engine: Any, kept: dict[str, Kept], folder: Path) -> None:
    """Puts ``kept`` into the engine's masters and its optimizer's state."""
    weights = engine.pipeline_stage.weights
    rule, names = weights.rule, engine.param_names
    by_target: dict[Any, list[Kept]] = {}
    # A flat group has one count of its updates. Stages had made more of them the later they stood.
    for layout in [] if weights.has_masters else weights.layouts:
        mine = {p: kept[names[p]].state for p in layout.params if names[p] in kept}
        scalars = _newest_scalars(list(mine.values()))
        for p, state in mine.items():
            whole = {key: value.to(p.device, copy=True) for key, value in state.items() if value.dim()}
            # Each its own: torch's rules count in place.
            rule.state[p] = {**whole, **{key: value.clone() for key, value in scalars.items()}}
            by_target[p] = [kept[names[p]]]
    group_of = {p.data_ptr(): (group, p) for group in rule.param_groups for p in group["params"]}
    for master, start, layout in weights.master_shards() if weights.has_masters else ():
        pieces = [piece for piece in _pieces(layout, start, master.numel()) if not is_gap(piece[0])]
        missing = [names[p] for p, _, _ in pieces if names[p] not in kept]
        if missing:
            raise CheckpointError(f"checkpoint {folder} has no optimizer state of {', '.join(missing[:3])}")
        for p, where, within in pieces:
            true = kept[names[p]].master
            master[where].copy_((p.data if true is None else true).reshape(-1)[within])
        group, target = group_of[master.data_ptr()]
        rows = rows_in_shard(rule, group, layout, start, master.numel())
        states = [kept[names[p]].state for p, _, _ in pieces]
        flats = {
            key: _laid_out(key, rows.get(key), master, pieces, [state[key] for state in states], names, folder)
            for key in sorted({key for state in states for key, value in state.items() if value.dim()})
        }
        by_target[target] = [kept[names[piece[0]]] for piece in pieces]
        rule.state[target] = {**flats, **_newest_scalars(states)}
    for group in rule.param_groups:
        found = [one for p in group["params"] for one in by_target.get(p, [])]
        if found:
            group["lr"] = max(found, key=lambda one: float(one.state.get("step", 0))).rate
    if isinstance(rule, DelayAwareOptimizer):
        rule.adopt_state()


def _laid_out(
    key: str,
    row: dict[Parameter, slice] | None,
    master: Tensor,
    pieces: list[tuple[Any, slice, slice]],
    values: list[Tensor],
    names: dict[Any, str],
    folder: Path,
) -> Tensor:
    """State ``key`` of a shard, flat: as the weights of its ``pieces`` lie, or in a ``row``. ``values``: of each piece.

    Raises CheckpointError for a value of another size.
    """
    flat = master.new_zeros(master.numel() if row is None else max(where.stop for where in row.values()))
    for (p, where, within), value in zip(pieces, values, strict=True):
        space = flat[where if row is None else row[p]]
        ours = value.reshape(-1)[within if row is None else slice(None)]
        if ours.numel() != space.numel():
            raise CheckpointError(
                f"checkpoint {folder} has {ours.numel()} numbers of {key} of {names[p]}, and this run's optimizer "
                f"{space.numel()}: give the parameters with which it was saved"
            )
        space.copy_(ours)
    return flat


def _newest_scalars(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    counted = [state for state in states if "step" in state]
    newest = max(counted, key=lambda state: float(state["step"]), default={})
    return {key: value.clone() for key, value in newest.items() if value.dim() == 0}


def _pieces(layout: FlatLayout, start: int, length: int) -> Iterator[tuple[Any, slice, slice]]:
    """The parameters in elements [start, start + length): where they lie in these, and which part of them does."""
    for p, offset in zip(layout.params, layout.offsets, strict=True):
        low, high = max(offset, start), min(offset + p.numel(), start + length)
        if low < high:
            yield p, slice(low - start, high - start), slice(low - offset, high - offset)
