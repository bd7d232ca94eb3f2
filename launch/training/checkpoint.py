"""Saving and resuming: DeepSpeed's checkpoints, and beside them what makes a run go on at the exact sample."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from noflush.failure.last_words import is_about_peers
from noflush.launch.arguments.progress import Position, position_in
from noflush.launch.arguments.settings import Checkpoints, Model, Ranks, Tokens
from noflush.launch.refusal import RefusedError
from noflush.launch.training.agreement import agree, on_first_rank
from noflush.launch.training.beside_weights import (
    MODEL,
    WEIGHTS_ALONE,
    write_manifest,
    write_model,
    write_position,
    write_tokens,
)
from noflush.launch.training.folder_faults import folder_faults
from noflush.launch.training.folder_lock import FolderLock
from noflush.launch.training.pickles import file_fault
from noflush.launch.training.random_state import random_state, restore
from noflush.patches.deepspeed.saving import Saves
from noflush.stage.checkpoint import LATEST, newest_complete
from noflush.stage.not_written import NotWrittenError


def tag_of(iteration: int) -> str:
    """Name of the checkpoint after ``iteration``."""
    return f"global_step{iteration}"


def open_folders(
    settings: Checkpoints, trains: bool, environ: Mapping[str, str]
) -> tuple[str | None, FolderLock | None]:
    """On all ranks, before anything large is built: (tag of the checkpoint to load, rank 0's lock of --save).

    The tag is None where training starts anew; the lock where this run saves nothing, and on all other ranks.

    Raises:
        RefusedError: on every rank; another run saves there, ``latest`` cannot be gone by, or a file of the checkpoint
            is damaged or would run code.
    """
    lock: FolderLock | None = None

    def choose() -> str | None:
        nonlocal lock
        if settings.save and trains:
            lock = FolderLock(settings.save, environ)
        # Again, with nobody else writing there any more.
        faults = folder_faults(settings, trains)
        if faults:
            raise RefusedError("; ".join(faults))
        return (settings.tag or newest_complete(settings.load)) if settings.load else None

    try:
        tag = on_first_rank(choose)
        if tag is not None:
            assert settings.load is not None
            files = sorted((Path(settings.load) / tag).rglob("*.pt"))
            mine = files[dist.get_rank() :: dist.get_world_size()]
            faults = [fault for path in mine if (fault := file_fault(path, settings.trusted))]
            agree(f"--load {settings.load}: {faults[0]}" if faults else None)
    except RefusedError:
        if lock is not None:
            lock.release()
        raise
    return tag, lock


def save(
    engine: Any, settings: Checkpoints, model: Model, tokens: Tokens, position: Position, lock: FolderLock | None = None
) -> None:
    """Saves on all ranks; ``latest`` names the checkpoint only when every part of it is on the disk.

    Raises RefusedError on every rank if a part of it, or of one that was still being written, cannot be written:
    ``latest`` and what it names are as before then.
    """
    assert settings.save is not None
    stands_at = copy.deepcopy(position)  # in the background it is written when training is further

    def finish(partial: Path) -> None:
        write_model(partial, model)
        write_tokens(partial, tokens)
        write_position(partial, stands_at)
        write_manifest(partial)

    on_first_rank(lock.check if lock is not None else lambda: None)
    state = {"noflush": dataclasses.asdict(position)}
    if settings.save_rng:
        state["random_state"] = random_state()
    try:
        if hasattr(engine, "saves"):
            engine.save_checkpoint(settings.save, tag_of(position.iteration), state, finish=finish)
        else:
            Saves(engine, background=False, places=dist.get_rank() == 0).save(
                lambda tag: engine.save_checkpoint(settings.save, tag=tag, client_state=state, save_latest=False),
                settings.save,
                tag_of(position.iteration),
                finish=finish,
            )
    except NotWrittenError as error:
        raise RefusedError(str(error), everywhere=True) from None


def load(engine: Any, settings: Checkpoints, tag: str | None) -> Position | None:
    """Loads checkpoint ``tag``, of which `open_folders` approved; None without one, and training starts anew.

    Raises RefusedError if DeepSpeed cannot load it into this engine.
    """
    if tag is None:
        return None
    name = f"--load {settings.load}: checkpoint {tag}"
    try:
        _, state = engine.load_checkpoint(
            settings.load,
            tag=tag,
            load_optimizer_states=settings.load_optimizer,
            load_lr_scheduler_states=settings.load_optimizer,
            load_module_only=settings.finetune,
        )
    except (AssertionError, RuntimeError, LookupError, ValueError, OSError) as error:
        if is_about_peers(error):
            raise
        if "OptimizerParamScheduler" in str(error):
            raise RefusedError(
                f"{name}: {error}; the learning-rate schedule is another than the checkpoint's. Lengths are in "
                "samples: those given in iterations (--train-iters, ...) are others at another --global-batch-size. "
                "Give --override-opt_param-scheduler to go on with the arguments', or "
                "--use-checkpoint-opt_param-scheduler with the checkpoint's",
                everywhere=True,  # one schedule, whatever the stage
            ) from None
        if "parameter groups" in str(error):
            raise RefusedError(
                f"{name}: its optimizer has other parameter groups; give --apply-wd-to-all, or leave it out, as it was "
                "when the checkpoint was written"
            ) from None
        reason = f"{type(error).__name__}: {error}".strip(": ").splitlines()[0]
        raise RefusedError(
            f"{name} does not fit this run ({reason}); train as it was trained, name another by --ckpt-step, or take "
            "its weights alone by --finetune or --no-load-optim"
        ) from error
    if state is None:
        raise RefusedError(f"{name} is incomplete; name another with --ckpt-step")
    if settings.load_rng and "random_state" in state and not getattr(engine, "recut", False):
        restore(state["random_state"])  # of another shape's stages they are nobody's
    if settings.finetune:
        return Position()
    if "noflush" not in state:
        raise RefusedError(
            f"{name} does not say which samples were trained on: it was not saved by pretrain_gpt.py; take its weights "
            "alone by --finetune"
        )
    position = position_in(state["noflush"])
    if not settings.load_optimizer:
        engine.lr_scheduler.step(position.consumed)  # the schedule stands where the run does
    return position


def model_faults(settings: Checkpoints, model: Model, ranks: Ranks, recuts: bool = True) -> list[str]:
    """How the checkpoint to load differs from ``model``, or from how it is to be split.

    ``recuts``: whether the engine takes other slices than its own, as noflush's does.
    """
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
    impl = there.pop("transformer_impl", "local")
    if impl != model.transformer_impl:
        local = "" if impl == "local" else ", or make local ones of it by convert_checkpoint.py --to-hf and --from-hf"
        faults.append(
            f"--load {settings.load}: the checkpoint is of --transformer-impl {impl}, whose weights have other names "
            f"than those of {model.transformer_impl}; give --transformer-impl {impl}{local}"
        )
    if (checkpoint / WEIGHTS_ALONE).exists() and not settings.finetune:
        faults.append(f"--load {settings.load}: the checkpoint holds weights alone; add --finetune")
    slices = len(list(checkpoint.glob("layer_01-model_*-model_states.pt")))
    if slices not in (0, ranks.tensor) and not recuts:
        faults.append(
            f"--load {settings.load}: the checkpoint has {slices} tensor-parallel slices, and "
            f"--tensor-model-parallel-size is {ranks.tensor}, and DeepSpeed's own engine cannot re-cut them; convert "
            "it by convert_checkpoint.py --to-hf and --from-hf"
        )
    free = {"attention_dropout", "hidden_dropout", "softmax_in_fp32", "loss_in_low_precision", "pad_vocabulary_to"}
    # What weights were drawn by says nothing of those that were loaded.
    free |= {"init_std", "embedding_init_std", "xavier_init"}
    if settings.finetune:
        free |= {"sequence", "vocabulary_padding"}
    if model.positions != "learned_absolute":
        free.add("max_positions")
    hint, rows = {}, there.get("vocabulary")
    if slices not in (0, ranks.tensor) and isinstance(rows, int) and not rows % ranks.tensor:
        hint["vocabulary"] = f"; give --make-vocab-size-divisible-by {rows // ranks.tensor}"
    return faults + [
        f"--load {settings.load}: the checkpoint's model has {name} = {there[name]}, the arguments say {here[name]}"
        + hint.get(name, "")
        for name in here
        if name in there and name not in free and there[name] != here[name]
    ]
