"""Why a checkpoint could not be written, in one message: which file, the reason, what is still there, what to do."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from noflush.stage.checkpoint import PARTIAL, newest_complete, remove

_PROBE = 1 << 20


class NotWrittenError(OSError):
    """A checkpoint that could not be written, on every rank; those before it are as they were."""


def why_not_written(error: Exception, path: str | Path, folder: Path) -> str:
    """The message, for ``path`` in the folder of checkpoints."""
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else _probed(folder)
    if reason is None:
        reason = (str(error) or type(error).__name__).splitlines()[0]
    try:
        free = f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"
    except OSError:
        free = "how much is free there cannot be told"
    try:
        newest = newest_complete(folder)
    except (ValueError, OSError):
        newest = None
    left = f"checkpoint {newest} is whole, and the newest" if newest else "no checkpoint is complete yet"
    then = f"start again with --load {folder}" if newest else "start again"
    return f"{path} could not be written: {reason}; {free}. {left}: make room or mend the disk, then {then}"


def _probed(folder: Path) -> str | None:
    """Why nothing can be written to ``folder``, found by trying; torch's own writer does not say. None if it can."""
    probe = folder / f"probe-{os.getpid()}{PARTIAL}"
    try:
        remove(probe)
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            room = _PROBE
            while room > 0:
                room -= os.write(descriptor, b"\0" * room)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.strerror
    finally:
        with contextlib.suppress(OSError):
            remove(probe)
    return None
