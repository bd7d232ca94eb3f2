"""Saving and resuming: DeepSpeed's checkpoints, and beside them what makes a run go on at the exact sample."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from noflush.checkpoint import LATEST, REPLACED, newest_complete, write_latest
from noflush.launch.arguments.progress import Position, position_in
from noflush.launch.arguments.settings import Checkpoints, Model, Ranks, Tokens
from noflush.launch.training.checkpoint_files import MODEL, WEIGHTS_ALONE, write_model, write_position, write_tokens
from noflush.launch.training.random_state import random_state, restore

_PARTIAL = ".partial"


def tag_of(iteration: int) -> str:
    """Name of the checkpoint after ``iteration``."""
    return f"global_step{iteration}"


def save(engine: Any, settings: Checkpoints, model: Model, tokens: Tokens, position: Position) -> None:
    """Saves on all ranks; ``latest`` names the checkpoint only when every part of it is on the disk."""
    assert settings.save is not None
    tag = tag_of(position.iteration)
    folder, partial = Path(settings.save), f"{tag}{_PARTIAL}"
    if dist.get_rank() == 0:
        shutil.rmtree(folder / partial, ignore_errors=True)
    dist.barrier()
    state = {"noflush": dataclasses.asdict(position)}
    if settings.save_rng:
        state["random_state"] = random_state()
    engine.save_checkpoint(settings.save, tag=partial, client_state=state, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        write_model(folder / partial, model)
        write_tokens(folder / partial, tokens)
        write_position(folder / partial, position)
        # One of this name may be there, and be the newest complete one: it goes when the new one is in its place.
        replaced = folder / f"{tag}{REPLACED}"
        shutil.rmtree(replaced, ignore_errors=True)
        if (folder / tag).exists():
            (folder / tag).rename(replaced)
        (folder / partial).rename(folder / tag)
        write_latest(folder, tag)
        shutil.rmtree(replaced, ignore_errors=True)
    # Nobody goes on to overwrite or to end before it is named.
    dist.barrier()


def load(engine: Any, settings: Checkpoints) -> Position | None:
    """Loads the checkpoint that ``settings`` name; None if there is none, and training starts anew."""
    tag = settings.load and (settings.tag or newest_complete(settings.load))
    if not tag:
        return None
    try:
        _, state = engine.load_checkpoint(
            settings.load,
            tag=tag,
            load_optimizer_states=settings.load_optimizer,
            load_lr_scheduler_states=settings.load_optimizer,
            load_module_only=settings.finetune,
        )
    except AssertionError as error:
        if "OptimizerParamScheduler" not in str(error):
            raise
        raise ValueError(
            f"--load {settings.load}: {error}; the learning-rate schedule is another than the checkpoint's. Lengths "
            "are in samples: those given in iterations (--train-iters, ...) are others at another --global-batch-size. "
            "Give --override-opt_param-scheduler to go on with the arguments', or --use-checkpoint-opt_param-scheduler "
            "with the checkpoint's"
        ) from None
    except ValueError as error:
        if "parameter groups" not in str(error):
            raise
        raise ValueError(
            f"--load {settings.load}: the optimizer of checkpoint {tag} has other parameter groups; give "
            "--apply-wd-to-all, or leave it out, as it was when the checkpoint was written"
        ) from None
    if state is None:
        raise FileNotFoundError(
            f"--load {settings.load}: checkpoint {tag} is incomplete; name another with --ckpt-step"
        )
    if settings.load_rng and "random_state" in state:
        restore(state["random_state"])
    if settings.finetune:
        return Position()
    position = position_in(state["noflush"])
    if not settings.load_optimizer:
        engine.lr_scheduler.step(position.consumed)  # the schedule stands where the run does
    return position


def model_faults(settings: Checkpoints, model: Model, ranks: Ranks) -> list[str]:
    """How the checkpoint to load differs from ``model``, or from how it is to be split."""
    if not settings.load:
        return []
    tag = settings.tag or newest_complete(settings.load)
    checkpoint = Path(settings.load) / (tag or LATEST)
    if not (checkpoint / MODEL).is_file():
        return []
    try:
        there, here = dict(json.loads((checkpoint / MODEL).read_text())), dataclasses.asdict(model)
    except (ValueError, TypeError, OSError) as error:
        return [f"--load {settings.load}: {checkpoint / MODEL} cannot be read ({error}); name another by --ckpt-step"]
    faults = []
    if (checkpoint / WEIGHTS_ALONE).exists() and not settings.finetune:
        faults.append(f"--load {settings.load}: the checkpoint holds weights alone; add --finetune")
    slices = len(list(checkpoint.glob("layer_01-model_*-model_states.pt")))
    if slices not in (0, ranks.tensor):
        faults.append(
            f"--load {settings.load}: the checkpoint has {slices} tensor-parallel slices, and "
            f"--tensor-model-parallel-size is {ranks.tensor}; convert it by convert_checkpoint.py --to-hf and --from-hf"
        )
    files = len(list(checkpoint.glob("mp_rank_*_model_states.pt")))
    stages = files // max(1, slices)
    if files and slices == ranks.tensor and stages != ranks.pipeline and not (checkpoint / WEIGHTS_ALONE).exists():
        faults.append(
            f"--load {settings.load}: the checkpoint is of {stages} stages, and --pipeline-model-parallel-size is "
            f"{ranks.pipeline}; its weights can be converted by convert_checkpoint.py --to-hf and --from-hf"
        )
    free = {"attention_dropout", "hidden_dropout", "softmax_in_fp32", "loss_in_low_precision", "pad_vocabulary_to"}
    # What weights were drawn by says nothing of those that were loaded.
    free |= {"init_std", "embedding_init_std", "xavier_init"}
    if settings.finetune:
        free.add("sequence")
    if model.positions != "learned_absolute":
        free.add("max_positions")
    return faults + [
        f"--load {settings.load}: the checkpoint's model has {name} = {there[name]}, the arguments say {here[name]}"
        for name in here
        if name in there and name not in free and there[name] != here[name]
    ]
