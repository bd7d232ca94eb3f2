"""What is wrong with the folders of --load and --save, as far as names and sizes tell. Imports no torch and no host."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from noflush.launch.arguments.settings import Checkpoints, Model, Ranks, Settings
from noflush.launch.training.beside_weights import WEIGHTS_ALONE, read_manifest
from noflush.stage.checkpoint import CheckpointError, checkpoints_in, is_tag, listed, newest_complete

_LAYER = re.compile(r"layer_(\d+)-(?:model_(\d+)-)?model_states\.pt")
_STAGE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_SHARD = re.compile(r"(bf16_|)zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def folder_faults(settings: Checkpoints, trains: bool) -> list[str]:
    """Whether --load holds what is to be loaded, and --save nothing that would be lost if this run ``trains``."""
    try:
        return _load_faults(settings) + (_save_faults(settings) if trains else [])
    except OSError as error:
        return [f"{error.filename} cannot be read: {error.strerror}; give a folder that you may read"]


def same_folder(one: str | None, other: str | None) -> bool:
    """Whether both name the same folder."""
    return one is not None and other is not None and os.path.realpath(one) == os.path.realpath(other)


def _load_faults(settings: Checkpoints) -> list[str]:
    load = settings.load
    if not load:
        return []
    path = Path(load)
    if path.exists() and not path.is_dir():
        return [f"--load {load} is no folder: give the folder that was the run's --save"]
    there = checkpoints_in(path)
    if settings.tag is not None:
        if is_tag(settings.tag) and (path / settings.tag).is_dir():
            return []
        return [f"--load {load} has no checkpoint {settings.tag}; it has {listed(there) or 'none'}"]
    try:
        found = newest_complete(path)
    except CheckpointError as error:
        return [f"--load {load}: {error}"]
    if found is not None or (same_folder(load, settings.save) and not settings.must_exist):
        return []
    if next(path.glob("mp_rank_*_model_states.pt"), None):
        return [f"--load {load} is one checkpoint: give --load {path.parent} --load-tag {path.name}"]
    if settings.must_exist:
        return [f"--load {load} holds no checkpoint, and --exit-on-missing-checkpoint is given"]
    return [f"--load {load} holds no checkpoint: give the folder of one, or leave --load out to begin anew"]


def _save_faults(settings: Checkpoints) -> list[str]:
    save = settings.save
    if not save or not Path(save).is_dir():
        return []
    there = checkpoints_in(save)
    if not there:
        return []
    if not same_folder(save, settings.load):
        return [
            f"--save {save} holds {listed(there)}, from which this run does not go on: it would write over them. Give "
            f"--load {save} to go on, or --save another folder"
        ]
    if settings.finetune and not all((Path(save) / tag / WEIGHTS_ALONE).exists() for tag in there):
        return [
            f"--save {save} holds {listed(there)}, and --finetune begins at iteration 0: it would write over them. "
            "Give --save another folder, or leave --finetune out to go on"
        ]
    return []


def load_part_faults(settings: Settings) -> list[str]:
    """`part_faults` of the checkpoint that ``settings`` load, and for DeepSpeed's own engine another shape of it.

    noflush's engine re-cuts a checkpoint of other stages, replicas or slices.
    """
    checkpoints, config = settings.checkpoints, settings.deepspeed
    if not checkpoints.load:
        return []
    tag = checkpoints.tag or newest_complete(checkpoints.load)
    if tag is None:
        return []
    checkpoint = Path(checkpoints.load) / tag
    sharded = config.get("bf16", {}).get("enabled") or config.get("zero_optimization", {}).get("stage", 0)
    of_its_shape = settings.ranks if settings.block is None else None
    faults = part_faults(checkpoint, settings.model, of_its_shape, bool(sharded) and checkpoints.load_optimizer)
    if of_its_shape is not None and not faults and sharded and checkpoints.load_optimizer:
        replicas = len(list(checkpoint.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")))
        if replicas != settings.ranks.data:
            faults.append(
                f"{checkpoint} has the optimizer's state in the shards of {replicas} data-parallel replicas, and this "
                f"run has {settings.ranks.data}, and DeepSpeed's own engine cannot re-cut them: start as many, or give "
                "--no-load-optim or --finetune"
            )
    return [f"--load {checkpoints.load}: {fault}" for fault in faults]


def listed_part_faults(settings: Checkpoints) -> list[str]:
    """Which files are missing or cut short that the checkpoint's own list names, whatever run is to load it.

    To be asked first: what is missing would else pass for a checkpoint of fewer stages.
    """
    tag = settings.load and (settings.tag or newest_complete(settings.load))
    if not settings.load or not tag:
        return []
    return [f"--load {settings.load}: {fault}" for fault in _part_faults(Path(settings.load) / tag, lambda there: [])]


def part_faults(checkpoint: Path, model: Model, ranks: Ranks | None, shards: bool) -> list[str]:
    """Which files of ``checkpoint`` are missing or cut short for a run of ``model`` over ``ranks``; None: over any.

    By what DeepSpeed's names must be, and by the checkpoint's own list of files if it has one. ``shards``: whether the
    optimizer's state is read too, and split over replicas.
    """
    return _part_faults(checkpoint, lambda there: _needed(there, model, ranks, shards))


def _part_faults(checkpoint: Path, by_name: Callable[[Mapping[str, int]], list[str]]) -> list[str]:
    try:
        sizes = read_manifest(checkpoint)
        there = {entry.name: entry.stat().st_size for entry in os.scandir(checkpoint) if entry.is_file()}
    except (OSError, ValueError) as error:
        return [f"{checkpoint} cannot be read: {error}; {_OTHER}"]
    needed = dict.fromkeys([*sizes, *by_name(there)])
    missing = [name for name in needed if name not in there]
    faults = []
    if missing:
        shown = ", ".join(missing[:3]) + " ..." * (len(missing) > 3)
        faults.append(f"{checkpoint} is incomplete: {shown} missing ({len(missing)} files); {_OTHER}")
    for name, size in sizes.items():
        if name in there and there[name] != size:
            faults.append(f"{checkpoint / name} has {there[name]} bytes of the {size} that were saved; {_OTHER}")
    return faults


_OTHER = "copy it again from where it was saved, or name another checkpoint by --ckpt-step"


def _needed(there: Mapping[str, int], model: Model, ranks: Ranks | None, shards: bool) -> list[str]:
    """DeepSpeed's names of the files that such a run reads, as far as those that are ``there`` tell."""
    slices = {int(found[2] or 0) for name in there if (found := _LAYER.fullmatch(name))} or {0}
    layers = range(model.layers + (2 if model.tied else 3))
    needed = [f"layer_{layer:02d}-model_{part:02d}-model_states.pt" for layer in layers for part in sorted(slices)]
    count = 1 + max((int(found[1]) for name in there if (found := _STAGE.fullmatch(name))), default=0)
    if ranks is not None:
        count = 1 if WEIGHTS_ALONE in there else ranks.pipeline * ranks.tensor
    stages = range(count)
    needed += [f"mp_rank_{stage:02d}_model_states.pt" for stage in stages]
    if shards:
        shard = [part for name in there if (part := _SHARD.fullmatch(name))]
        prefix = shard[0][1] if shard else ""
        replicas = range(max((int(part[2]) for part in shard), default=0) + 1)
        needed += [
            f"{prefix}zero_pp_rank_{replica}_mp_rank_{stage:02d}_optim_states.pt"
            for replica in replicas
            for stage in stages
        ]
    return needed
