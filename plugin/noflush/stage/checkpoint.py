"""A folder of checkpoints: which of them are there, and the file that names the newest complete one."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

LATEST = "latest"
PARTIAL = ".partial"
"""Behind the name of what is still being written."""
REPLACED = ".replaced"
"""Behind the tag of a checkpoint that is making room for a new one of its name."""


class CheckpointError(ValueError):
    """A folder of checkpoints that cannot be gone on from as it is; the message names folder, rule and fix."""


def write_whole(path: Path, text: str) -> None:
    """Puts ``text`` at ``path``: all at once, on the disk when this returns, and never through a symbolic link."""
    scratch = path.with_name(path.name + PARTIAL)
    remove(scratch)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, path)
        sync(path.parent)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Removes what is at ``path``, if anything: a folder with all in it, of a symbolic link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Returns when what was written to the file or folder ``path`` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_room(folder: str | Path, tag: str) -> Path:
    """An empty folder in ``folder`` for the files of checkpoint ``tag``, until `put_in_place`."""
    partial = Path(folder) / f"{tag}{PARTIAL}"
    remove(partial)
    partial.mkdir(parents=True)
    return partial


def put_in_place(folder: str | Path, tag: str, latest: bool = True) -> None:
    """The files of ``tag``, all written, become the checkpoint of that name, and the newest one if ``latest``.

    A kill at any moment leaves a checkpoint that is whole, and named if one was. On the disk when this returns.
    """
    at = Path(folder)
    partial, replaced = at / f"{tag}{PARTIAL}", at / f"{tag}{REPLACED}"
    sync(partial)
    # One of this name may be there, and be the newest complete one: it goes when the new one is in its place.
    remove(replaced)
    if os.path.lexists(at / tag):
        (at / tag).rename(replaced)
    if latest and not os.path.lexists(at / LATEST):
        # The first one is named before it is in its place, so that none ever lies there that nothing names.
        write_latest(at, tag)
    partial.rename(at / tag)
    sync(at)
    if latest:
        write_latest(at, tag)
    remove(replaced)


def write_latest(folder: str | Path, tag: str) -> None:
    """Has ``folder``'s ``latest`` name ``tag``: all at once, and on the disk when this returns."""
    write_whole(Path(folder) / LATEST, tag)


def checkpoints_in(folder: str | Path) -> list[str]:
    """Tags of the checkpoints in ``folder``, whole or not, in the order of their numbers; none being written."""
    path = Path(folder)
    if not path.is_dir():
        return []
    found = [
        entry.name
        for entry in path.iterdir()
        if entry.is_dir() and not entry.name.endswith(PARTIAL) and next(entry.glob("*_states.pt"), None)
    ]
    return sorted(found, key=lambda tag: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", tag)])


def newest_complete(folder: str | Path) -> str | None:
    """The tag of the newest complete checkpoint in ``folder``; None if it holds none at all.

    Raises CheckpointError if ``latest`` does not say which of those there are: to begin anew would write over them.
    """
    path = Path(folder) / LATEST
    if not os.path.lexists(path):
        there = checkpoints_in(folder)
        if there:
            raise CheckpointError(f"{path} is missing, {_fix(folder, there)}")
        return None
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file that can be read"
        raise CheckpointError(f"{path} is {kind}, {_fix(folder, checkpoints_in(folder))}")
    try:
        tag = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}), {_fix(folder, checkpoints_in(folder))}") from None
    if not tag:
        raise CheckpointError(f"{path} is empty, {_fix(folder, checkpoints_in(folder))}")
    if not is_tag(tag):
        raise CheckpointError(
            f"{path} holds {tag[:80]!r}, which is no folder's name, {_fix(folder, checkpoints_in(folder))}"
        )
    # It may have been about to be put in its place when the run ended; or the one that it replaces is still aside.
    for name in (tag, f"{tag}{REPLACED}", f"{tag}{PARTIAL}"):
        if (path.parent / name).is_dir():
            return name
    raise CheckpointError(f"{path} names {tag}, which is missing, {_fix(folder, checkpoints_in(folder))}")


def named_by_latest(folder: str | Path) -> str | None:
    """The folder's name of the checkpoint that ``latest`` names, wherever a kill has left it; None without ``latest``.

    Raises CheckpointError if it cannot be found.
    """
    return newest_complete(folder) if (Path(folder) / LATEST).is_file() else None


def is_tag(word: str) -> bool:
    """Whether ``word`` is the plain name of a folder, and leads nowhere else."""
    return word.isprintable() and word not in ("", ".", "..") and not {"/", os.sep} & set(word)


def listed(tags: list[str]) -> str:
    """``tags`` for a message: the last few of many."""
    return ", ".join(tags) if len(tags) <= 4 else f"{len(tags)} checkpoints up to {', '.join(tags[-3:])}"


def _fix(folder: str | Path, there: list[str]) -> str:
    if not there:
        return f"and {folder} holds no checkpoint: remove {LATEST} to begin anew, or give another folder"
    return (
        f"and {folder} holds {listed(there)}: name the one to go on from in {Path(folder) / LATEST}, or give another "
        "folder to begin anew"
    )
