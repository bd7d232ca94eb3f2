"""A checkpoint's files while they are written: a rank whose disk is full must not leave the others waiting."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from noflush.stage.checkpoint import PARTIAL, newest_complete, remove

_PROBE = 1 << 20


class Writing:
    """While it is entered, ``engine`` goes on when a file cannot be written, and `error` and `path` say so afterwards.

    DeepSpeed's ranks wait for each other between their files; one that raised there would be waited for in vain.
    """

    def __init__(self, engine: Any) -> None:
        self.error: Exception | None = None
        self.path: str | None = None
        self._watched = (engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")

    def __enter__(self) -> Writing:
        for owner, name in self._watched:
            setattr(owner, name, self._keeping(getattr(owner, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name in self._watched:
            delattr(owner, name)

    def _keeping(self, write: Any) -> Any:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            if self.error is not None:
                return None
            try:
                return write(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                self.error, self.path = error, kwargs.get("path") or str(args[-1])
                return None

        return attempt


def why_not_written(error: Exception, path: str | Path, folder: Path) -> str:
    """One message: which file, why, how much room there is, what is still there, and what to do."""
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
