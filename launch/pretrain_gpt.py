"""Trains a GPT with Megatron's arguments, the pipeline never flushing.

deepspeed --num_gpus 4 launch/pretrain_gpt.py ARGUMENTS --deepspeed --deepspeed_config ds_config.json
torchrun --nproc_per_node 4 launch/pretrain_gpt.py ARGUMENTS ...
srun python launch/pretrain_gpt.py ARGUMENTS ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" and not __package__:  # run by its path
    run_path(str(Path(__file__).with_name("own_code.py")))["or_exit"](__file__)

from noflush.config import ConfigError
from noflush.launch.arguments.parser import ArgumentsError, expand
from noflush.launch.arguments.settings import Settings
from noflush.launch.ranks import Rendezvous, export, rendezvous
from noflush.launch.refusal import RefusedError, refuse
from noflush.launch.signals import Signals, listen
from noflush.stage.checkpoint import write_whole

if TYPE_CHECKING:
    from noflush.launch.arguments.progress import Position
    from noflush.launch.training.loop import Training

_FOR_RANK_0 = 20.0
_LEAVING = 60.0
"""Seconds for a finished run to leave its groups, and for the interpreter to end."""
STOPPED = "stopped"
"""File in the --save folder that says why a run ended before its last iteration; removed by the next one."""


def settings_of(argv: list[str], world: int) -> tuple[Settings, Mapping[str, Sequence[str]]]:
    """The run's settings, files checked and vocabulary known, and the options without meaning.

    Raises ArgumentsError listing every fault, before any process group or weight.
    """
    from noflush.launch.arguments.files import file_faults, token_id_faults
    from noflush.launch.arguments.understand import understand
    from noflush.launch.data.tokenizer import make_tokenizer
    from noflush.launch.training.checkpoint import model_faults
    from noflush.launch.training.devices import device_faults
    from noflush.launch.training.folder_faults import folder_faults, listed_part_faults, load_part_faults
    from noflush.launch.training.vocabulary import with_vocabulary
    from noflush.launch.training.writers import board_needed

    settings, without_meaning = understand(argv, world)
    faults = file_faults(settings) + board_needed(settings)
    faults += [] if settings.dry_run else device_faults(settings, os.environ)
    faults += folder_faults(settings.checkpoints, trains=not settings.steps.skip_train)
    if not faults:
        try:
            tokenizer = make_tokenizer(settings.tokens)
            settings = with_vocabulary(settings, tokenizer.vocab_size)
        except ValueError as error:
            faults.append(str(error))
        else:
            faults += token_id_faults(settings.data, tokenizer.vocab_size)
    faults += [] if faults else listed_part_faults(settings.checkpoints)
    recuts = settings.block is not None
    faults += [] if faults else model_faults(settings.checkpoints, settings.model, settings.ranks, recuts)
    faults += [] if faults else load_part_faults(settings)
    if faults:
        raise ArgumentsError(faults)
    return settings, without_meaning


def main(argv: list[str] | None = None) -> int:
    """Runs; the exit status: 0 for trained to the end or stopped with a checkpoint.

    2 for what no retry can mend: wrong arguments, a checkpoint that cannot be loaded or saved. 1 for any other end.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        found = rendezvous(os.environ)
    except ValueError as error:
        print(f"noflush: {error}", file=sys.stderr)  # noqa: T201
        return 2
    try:
        signals = listen(expand(argv))
        settings, without_meaning = settings_of(argv, found.world_size)
    except ArgumentsError as error:
        if found.rank == 0:
            print(f"noflush: {error}", file=sys.stderr, flush=True)  # noqa: T201
        else:
            # A launcher ends all ranks when the first one ends: that must be the one that says why.
            time.sleep(_FOR_RANK_0)
        return 2
    from noflush.launch.dry_run import print_dry_run
    from noflush.launch.gpt.size import parameters
    from noflush.launch.start_lines import start_lines

    count = parameters(settings.model)
    lines = start_lines(settings, count, without_meaning)
    if settings.dry_run:
        if found.rank == 0:
            print_dry_run(settings, lines)
        return 0
    import torch

    try:
        found = export(found, os.environ, torch.cuda.device_count())
    except ValueError as error:
        print(f"noflush: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(found, flush=True)  # noqa: T201
    return _train(settings, found, lines, count, signals)


def prepare(
    settings: Settings, rank: int, lines: Sequence[str], count: int, signals: Signals, store: Any = None
) -> Training:
    """Joins the other ranks, met at ``store``, and makes everything of this one ready: engine, checkpoint, data."""
    from noflush.launch.arguments.progress import Position, steps_from, traced
    from noflush.launch.data.datasets import build_datasets
    from noflush.launch.data.tokenizer import make_tokenizer
    from noflush.launch.training import checkpoint
    from noflush.launch.training.loop import Training, say
    from noflush.launch.training.start import build_engine, join

    join(settings.ranks, store)
    if rank == 0:
        for line in lines:
            say(line)
    tag, lock = checkpoint.open_folders(settings.checkpoints, not settings.steps.skip_train, os.environ)
    if lock is not None:
        (lock.path.parent / STOPPED).unlink(missing_ok=True)
    try:
        engine = build_engine(settings)
        position = checkpoint.load(engine, settings.checkpoints, tag)
    except RefusedError:
        if lock is not None:
            lock.release()
        raise
    if position is not None:
        position = traced(position, settings.batch, settings.steps.in_iterations)
        settings = dataclasses.replace(settings, steps=steps_from(settings.steps, settings.batch, position))
        if rank == 0:
            say(f"resumed from {settings.checkpoints.load} at iteration {position.iteration}")
    reads = engine.is_first_stage() or engine.is_last_stage()
    datasets = build_datasets(settings, make_tokenizer(settings.tokens), reads)
    return Training(settings, engine, datasets, position or Position(), count, signals, lock)


def _train(settings: Settings, found: Rendezvous, lines: Sequence[str], count: int, signals: Signals) -> int:
    from noflush.failure.exit_guard import end_within
    from noflush.failure.keeper import keeper_watched
    from noflush.launch.training.meeting import MeetingError
    from noflush.launch.training.start import leave, meet_others, rank_name
    from noflush.stage.alone import is_alone

    training = None
    try:
        if is_alone():  # the others have met, and train
            training = prepare(settings, found.rank, lines, count, signals)
        else:
            store = meet_others(settings.ranks)
            with keeper_watched(lambda: store, 60.0 * settings.ranks.timeout_minutes, rank_name(settings.ranks, 0)):
                training = prepare(settings, found.rank, lines, count, signals, store)
        reason = training.run()
        if found.rank == 0:
            say_why(training.settings, training.position, reason)
        if training.lock is not None:
            training.lock.release()
        # All is done and saved: a peer that hangs on its way out changes nothing.
        call_off = end_within(_LEAVING, 0)
        leave()
        call_off()
    except MeetingError as error:
        end_within()
        print(f"noflush: {error}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)  # a thread may still be asking the store
    except (RefusedError, ConfigError) as error:
        if training is not None and training.lock is not None:
            training.lock.release()
        refuse(error, found.rank, settings.checkpoints.save)
    except Exception as error:
        # First of all: what follows may block, on a store or on a pipe that nobody reads.
        end_within()
        traceback.print_exc()
        _say_last_words(settings, found, training.position.iteration if training else 0, error)
        if training is not None:
            with contextlib.suppress(RuntimeError, OSError):  # of a device at fault, or nobody reads
                training.say_rest()
        # Not to wait for peers on the way out: what is left to do would only hang.
        os._exit(1)
    return 0


def _say_last_words(settings: Settings, found: Rendezvous, iteration: int, error: Exception) -> None:
    from noflush.failure.last_words import explain
    from noflush.launch.training.last_words import lines
    from noflush.launch.training.start import stage_of

    stage = stage_of(settings.ranks, found.rank)
    said = lines(explain(error), found.rank, stage, found.world_size, iteration, settings.checkpoints)
    print("\n".join(said), file=sys.stderr, flush=True)  # noqa: T201
    sys.stdout.flush()


def say_why(settings: Settings, position: Position, reason: str | None) -> None:
    iteration, left = position.iteration, settings.steps.samples - position.consumed
    folder = settings.checkpoints.save
    if reason is None:
        rest = f"; {left} of {settings.steps.samples} samples are left, less than a batch" if left > 0 else ""
        print(f"finished at iteration {iteration}{rest}", flush=True)  # noqa: T201
    else:
        print(f"stopped at iteration {iteration}: {reason}", flush=True)  # noqa: T201
    if folder and reason is not None:
        write_whole(Path(folder) / STOPPED, f"iteration {iteration} of {settings.steps.iterations}, {reason}\n")


if __name__ == "__main__":
    from noflush.failure.exit_guard import end_within

    ended = main()
    end_within(_LEAVING, ended)
    sys.exit(ended)
