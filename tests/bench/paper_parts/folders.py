"""A run's folder: its settings, checkpoints and logs, and how far they say that it is."""

from __future__ import annotations

import contextlib
import json
import re

from noflush.stage.checkpoint import CheckpointError, checkpoints_in, newest_complete, remove, write_whole
from tests.bench.paper_parts.agenda import Standing
from tests.bench.paper_parts.progress import read
from tests.bench.paper_parts.setting import differences

SETTINGS = "settings.json"


class FolderError(ValueError):
    """A folder that holds something else than what is to be gone on with."""


def logs_of(run, stages):
    """The logs of the last stage, which has the losses, a slice each, in order."""
    return sorted((run.folder / "logs").glob(f"*-{stages - 1}.log"), key=_slice)


def log_name(number, rank):
    """Of a slice's rank; ``%t`` for srun to fill in."""
    return f"{number:04d}-{rank}.log"


def _slice(path):
    return int(path.name.partition("-")[0])


def slices_of(run):
    """How many were started: the number of the newest."""
    return max((_slice(path) for path in (run.folder / "logs").glob("*-*.log")), default=0)


def progress_of(run, stages):
    """What its logs say."""
    return read([path.read_text(errors="replace") for path in logs_of(run, stages)])


def progress_of_log(path):
    """What one slice's log says so far; nothing before it is there."""
    return read([path.read_text(errors="replace")] if path.exists() else [])


def last_lines(path):
    """What a rank said last; nothing if it has no log."""
    return path.read_text(errors="replace").splitlines()[-6:] if path.exists() else []


def standing_of(run, stages):
    """How far it is. Raises FolderError if its checkpoints cannot be gone on from."""
    try:
        tag = newest_complete(run.folder)
    except CheckpointError as error:
        raise FolderError(str(error)) from None
    number = re.search(r"(\d+)", tag or "")
    reached = int(number[1]) if number else 0
    loss = progress_of(run, stages).validation.get(run.iterations) if reached >= run.iterations else None
    return Standing(run, slices_of(run), reached, loss)


def check(run, settings):
    """Raises FolderError if the run's folder was begun with other ``settings``, or holds none but a checkpoint."""
    path = run.folder / SETTINGS
    if not path.exists():
        if checkpoints_in(run.folder):
            raise FolderError(f"{run.folder} holds checkpoints, but no {SETTINGS}: give another --out")
        return
    try:
        there = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise FolderError(f"{path} cannot be read ({error}): give another --out, or remove {run.folder}") from None
    found = differences(there, settings)
    if found:
        raise FolderError(f"{run.folder} was begun with other settings: {'; '.join(found)}")


def rate_in(run):
    """The learning rate that the run's folder was begun with; None if it was not begun."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads((run.folder / SETTINGS).read_text())["--lr"])
    return None


def write_config(run, config):
    """Writes the DeepSpeed config that the launcher reads."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_whole(run.folder / "ds_config.json", json.dumps(config, indent=2))


def begin(run, settings, config):
    """Writes what the launcher reads, and what the next start is compared with."""
    (run.folder / "logs").mkdir(parents=True, exist_ok=True)
    write_config(run, config)
    write_whole(run.folder / SETTINGS, json.dumps(settings, indent=2))


def prune(run):
    """Removes all checkpoints but the newest: of 134 M parameters with their moments each takes 1.6 GB."""
    with contextlib.suppress(CheckpointError, OSError):
        newest = newest_complete(run.folder)
        for tag in checkpoints_in(run.folder):
            if tag != newest:
                remove(run.folder / tag)
