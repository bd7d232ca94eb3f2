"""The file that names a folder's newest complete checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

LATEST = "latest"
REPLACED = ".replaced"
"""Behind the tag of a checkpoint that is making room for a new one of its name."""


def write_latest(folder: str | Path, tag: str) -> None:
    """Has ``folder``'s ``latest`` name ``tag``: all at once, and on the disk when this returns."""
    path = Path(folder) / LATEST
    scratch = path.with_suffix(".partial")
    with scratch.open("w") as stream:
        stream.write(tag)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(scratch, path)


def newest_complete(folder: str | Path) -> str | None:
    """The tag of the newest complete checkpoint in ``folder``; None if it holds none."""
    path = Path(folder) / LATEST
    if not path.is_file():
        return None
    tag = path.read_text().strip()
    if not (path.parent / tag).exists() and (path.parent / f"{tag}{REPLACED}").exists():
        return f"{tag}{REPLACED}"
    return tag
