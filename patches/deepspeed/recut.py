"""A checkpoint of other stages (their number, or which layers each had), replicas or slices, re-cut by layer.

DeepSpeed's files of weights are a layer each, whatever the stages. Optimizer state is read here by the names of
parameters, from all old stages' files and all their replicas' shards, and put into this run's optimizer. Of another
number of tensor-parallel slices all are read, and divided anew as the module's `slice_rule` says. What was in flight is
not put back: the pipeline fills anew.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noflush.methods.matrices import is_gap
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.patches.deepspeed.slice_rule import resliced, rule_of, shape_among
from noflush.patches.deepspeed.universal import own_state
from noflush.stage.checkpoint import CheckpointError
from noflush.stage.layout import FlatLayout

logger = logging.getLogger("noflush")

PARAMETERS = "noflush_parameters"
"""In DeepSpeed's file of a stage: names of the parameters of an optimizer that numbers them."""
PARTS = "noflush_parts"
ORDER = "noflush_order"
"""In DeepSpeed's file of a stage: where the module was cut, as its ``parts``."""
# What DeepSpeed keeps to itself of such a file; the rest is the script's.
_OWN = {
    *("module", "optimizer", "lr_scheduler", "sparse_tensor_module_names", "skipped_steps", "global_steps"),
    *("dp_world_size", "mp_world_size", "data_sampler", "random_ltd", PARAMETERS, PARTS, ORDER),
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


@dataclass
class _Kept:
    """What a checkpoint has of one parameter: its float32 weights, state of its optimizer, and its group's rate."""

    master: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    rate: float = 0.0


def shape_of(folder: Path) -> Shape | None:
    """The shape of the checkpoint in ``folder``; None if there is none of a pipeline."""
    parts = len(list(folder.glob("mp_rank_*_model_states.pt")))
    layers = list(folder.glob("layer_*-model_states.pt"))
    slices = max(1, len({m[1] for f in layers if (m := re.search(r"-model_(\d+)-model_states", f.name))}))
    if not layers or parts < slices:  # weights alone, which launch/convert_checkpoint.py imports, have one part
        return None
    shards = [int(m[1]) for f in _shards(folder, 0) if (m := re.search(r"zero_pp_rank_(\d+)_", f.name))]
    cut = _read(first).get(PARTS) if (first := _stage_file(folder, 0)).is_file() else None
    return Shape(parts // slices, slices, max(shards, default=-1) + 1, None if cut is None else tuple(cut))


def other_shape(engine: Any, folder: Path) -> Shape | None:
    """The shape of the checkpoint in ``folder``, where it is another than this run's; else None.

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
    if there.stages == engine.num_stages and same_replicas and _cut_alike(engine.module.parts, folder, there):
        return None
    return there


def _cut_alike(parts: list[int], folder: Path, there: Shape) -> bool:
    """Whether the stages ``there``, as many as here, had the layers that they have with ``parts``.

    A checkpoint that does not say where it was cut, of stock DeepSpeed or an older noflush, may name the parameters of
    every stage, of which those in no tie begin with their layer's number.
    """
    if there.parts is not None:
        return list(there.parts) == parts
    for stage in range(there.stages):
        file = _read(_stage_file(folder, stage * there.slices))
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
        CheckpointError: it lacks a parameter's state, or has some that depends on how matrices lay in a shard.
    """
    engine.module.load_state_dir(str(folder), strict=strict, checkpoint_engine=engine.checkpoint_engine)
    sliced_alike = there.slices == engine.grid.get_slice_parallel_world_size()
    wanted = [engine.grid.get_slice_parallel_rank()] if sliced_alike else range(there.slices)
    parts = [stage * there.slices + wanted[0] for stage in range(there.stages)]
    kept: dict[str, _Kept] = {}
    for stage in range(there.stages):
        of_slices = [_collect(folder, stage * there.slices + number) for number in wanted]
        # Of a tied module's own parameters the first stage's are in use; the others' have the same names.
        kept = (of_slices[0] if sliced_alike else _resliced(engine, of_slices, folder)) | kept
    _fill(engine, kept, folder)
    first, last = _read(_stage_file(folder, parts[0])), _read(_stage_file(folder, parts[-1]))
    if with_schedule and engine.lr_scheduler is not None and last.get("lr_scheduler") is not None:
        # The last stage has made an update a call: its schedule stands where the run does.
        engine.lr_scheduler.load_state_dict(last["lr_scheduler"])
    shards = _shards(folder, parts[-1])
    if engine.fp16_enabled() and shards:
        saved = _read(shards[0])["optimizer_state_dict"]["loss_scaler"]
        if type(saved) is type(engine.optimizer.loss_scaler):  # dynamic or not, as this run's
            engine.optimizer.loss_scaler = saved
    engine.global_steps, engine.skipped_steps = first["global_steps"], first["skipped_steps"]
    engine.global_samples = first.get("global_samples", first["global_steps"] * engine.train_batch_size())
    if engine.global_rank == 0:
        moved = there.stages == engine.num_stages and there.parts != tuple(engine.module.parts)
        logger.warning(
            "noflush: %s was written by %d stages%s%s%s: re-cut by layer for %d stages of %d; the pipeline fills anew",
            folder, there.stages, f" of {there.replicas} replicas" * bool(there.replicas),
            " that had other layers" * moved, f" and {there.slices} tensor-parallel slices" * (not sliced_alike),
            engine.num_stages, engine.dp_world_size,
        )  # fmt: skip
    return {key: value for key, value in first.items() if key not in _OWN}


def _stage_file(folder: Path, part: int) -> Path:
    return folder / f"mp_rank_{part:02d}_model_states.pt"


def _shards(folder: Path, part: int) -> list[Path]:
    """ZeRO's files of a stage, in the order of the replicas."""
    found = folder.glob(f"*zero_pp_rank_*_mp_rank_{part:02d}_optim_states.pt")
    return sorted(found, key=lambda path: int(re.findall(r"zero_pp_rank_(\d+)_", path.name)[0]))


def _read(path: Path) -> dict[str, Any]:
    # Mapped: of other stages' parameters nothing is read but where they lie.
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    return found


def _collect(folder: Path, part: int) -> dict[str, _Kept]:
    """What the files of one old stage have of its parameters."""
    kept: dict[str, _Kept] = {}
    shards = _shards(folder, part)
    if not shards:
        file = _read(_stage_file(folder, part))
        names = file.get(PARAMETERS)
        if names is None:
            raise CheckpointError(
                f"checkpoint {folder} does not say which parameter each of its optimizer's states is of: it was "
                "written by stock DeepSpeed or an older noflush; load it with as many stages and save it, or take its "
                "weights alone (load_module_only=True)"
            )
        rates = {n: group["lr"] for group in file["optimizer"]["param_groups"] for n in group["params"]}
        for number, state in file["optimizer"]["state"].items():
            kept[names[number]] = _Kept(None, dict(state), rates[number])
        return kept
    for shard in shards:
        of_shard = _read(shard)["optimizer_state_dict"]
        state, groups = of_shard["base_optimizer_state"]["state"], of_shard["base_optimizer_state"]["param_groups"]
        masters = of_shard["single_partition_of_fp32_groups"]
        for group, (master, pieces) in enumerate(zip(masters, of_shard["param_slice_mappings"], strict=True)):
            for name, piece in pieces.items():
                found = kept.setdefault(name, _Kept(rate=groups[group]["lr"]))
                found.master = _join(found.master, master, piece)
                for key, value in own_state(state[group]).items():
                    if value.dim() == 0:
                        found.state[key] = value
                    elif value.numel() == master.numel():
                        found.state[key] = _join(found.state.get(key), value, piece)
                    else:
                        raise CheckpointError(
                            f"checkpoint {folder}: {key} of {name} lies in a shard by matrices, and cannot be re-cut; "
                            "go on with the same stages, layers of each and replicas"
                        )
    return kept


def _resliced(engine: Any, of_slices: list[dict[str, _Kept]], folder: Path) -> dict[str, _Kept]:
    """What this rank's slice has of ``of_slices``, all slices of one old stage: of its own parameters only."""
    grid, rule = engine.grid, rule_of(engine.module)
    assert rule is not None, "`other_shape` refuses"
    rank, count = grid.get_slice_parallel_rank(), grid.get_slice_parallel_world_size()
    own = {engine.param_names[p]: p.shape for layout in engine.pipeline_stage.weights.layouts for p in layout.params}
    kept: dict[str, _Kept] = {}
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
        kept[name] = _Kept(anew(masters, "the weight") if masters else None, state, parts[0].rate)
    return kept


def _join(before: Tensor | None, flat: Tensor, piece: Any) -> Tensor:
    part = flat.view(-1).narrow(0, piece.start, piece.numel)
    return part if before is None else torch.cat([before, part])


@torch.no_grad()
def _fill(engine: Any, kept: dict[str, _Kept], folder: Path) -> None:
    """Puts ``kept`` into the engine's masters and its optimizer's state."""
    weights = engine.pipeline_stage.weights
    rule, names = weights.rule, engine.param_names
    by_target: dict[Any, list[_Kept]] = {}
    # A flat group has one count of its updates. Stages had made more of them the later they stood.
    for layout in [] if weights.has_masters else weights.layouts:
        mine = {p: kept[names[p]].state for p in layout.params if names[p] in kept}
        scalars = _newest_scalars(list(mine.values()))
        for p, state in mine.items():
            whole = {key: value.to(p.device, copy=True) for key, value in state.items() if value.dim()}
            # Each its own: torch's rules count in place.
            rule.state[p] = {**whole, **{key: value.clone() for key, value in scalars.items()}}
            by_target[p] = [kept[names[p]]]
    rule_params = {p.data_ptr(): p for group in rule.param_groups for p in group["params"]}
    for master, start, layout in weights.master_shards() if weights.has_masters else ():
        pieces = [piece for piece in _pieces(layout, start, master.numel()) if not is_gap(piece[0])]
        missing = [names[p] for p, _, _ in pieces if names[p] not in kept]
        if missing:
            raise CheckpointError(f"checkpoint {folder} has no optimizer state of {', '.join(missing[:3])}")
        states = [kept[names[p]].state for p, _, _ in pieces]
        keys = {key for state in states for key, value in state.items() if value.dim()}
        flat_state = {key: torch.zeros_like(master) for key in keys}
        for (p, where, within), state in zip(pieces, states, strict=True):
            true = kept[names[p]].master
            master[where].copy_((p.data if true is None else true).reshape(-1)[within])
            for key in keys:
                flat_state[key][where].copy_(state[key].reshape(-1)[within])
        p = rule_params[master.data_ptr()]
        by_target[p] = [kept[names[piece[0]]] for piece in pieces]
        rule.state[p] = {**flat_state, **_newest_scalars(states)}
    for group in rule.param_groups:
        found = [one for p in group["params"] for one in by_target.get(p, [])]
        if found:
            group["lr"] = max(found, key=lambda one: float(one.state.get("step", 0))).rate
    if isinstance(rule, DelayAwareOptimizer):
        rule.adopt_state()


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
