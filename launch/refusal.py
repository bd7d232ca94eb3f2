"""An end that no retry can mend: one message, exit status 2, and under SLURM no further try."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from noflush.stage.checkpoint import write_whole

STATUS = 2
_AFTER_RANK_0 = 1.0
"""Seconds: a launcher ends all ranks when the first one ends, and that should be the one that says why."""


class RefusedError(ValueError):
    """What the user has to mend before a run can go on: the message states the value seen, the rule and the fix.

    Attributes:
        everywhere: every rank raises the same, so that one of them says it for all.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def marker(folder: str, job: str) -> Path:
    """File in the --save folder ``folder`` that tells SLURM's script of job ``job`` not to try again."""
    return Path(folder) / f"refused-{job}"


def say_refused(error: ValueError, rank: int, folder: str | None, environ: Mapping[str, str]) -> int:
    """Prints ``error`` once, alone, and leaves the marker if a SLURM job saves to ``folder``; the exit status."""
    if rank and getattr(error, "everywhere", False):
        time.sleep(_AFTER_RANK_0)
        return STATUS
    print(f"noflush: {error}", file=sys.stderr, flush=True)  # noqa: T201
    job = environ.get("SLURM_JOB_ID")
    if folder and job:
        # The folder may be what is at fault; the exit status remains.
        with contextlib.suppress(OSError):
            write_whole(marker(folder, job), f"{error}\n")
    return STATUS


def refuse(error: ValueError, rank: int, folder: str | None) -> None:
    """Ends this process with `say_refused`'s status, waiting for no other rank."""
    status = say_refused(error, rank, folder, os.environ)
    sys.stdout.flush()
    os._exit(status)
