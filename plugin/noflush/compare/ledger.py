"""``trials.jsonl``: a line for every finished trial, safe against a kill at any time and a second process."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from noflush.compare.settings import Record, Task, Trial


class Ledger:
    """The finished trials of a folder, by all the settings that decide their numbers.

    Trials of other settings in the same file have other keys and are not seen.

    Raises ValueError if the folder cannot be made or its file read.
    """

    def __init__(self, folder: Path, task: Task) -> None:
        self._task = task
        self.path = folder / "trials.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = dict(_read(self.path))
        except OSError as error:
            raise ValueError(f"--out {folder}: {error.strerror}; give a folder that can be written") from error

    def __len__(self) -> int:
        return len(self._records)

    def find(self, trial: Trial) -> Record | None:
        """What is known of ``trial``."""
        return self._records.get(trial.key(self._task))

    def add(self, trial: Trial, record: Record) -> None:
        """Keeps what ``trial`` found; it is on the disk when this returns."""
        key = trial.key(self._task)
        self._records[key] = record
        line = {"name": trial.contestant.name, "settings": json.loads(key), **_to_json(record)}
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0, os.SEEK_END)
            if file.tell():  # a line that a kill cut short gets its end
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> Iterator[tuple[str, Record]]:
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue  # cut short by a kill: that trial runs again
        yield json.dumps(read["settings"], sort_keys=True), _from_json(read)


def _to_json(record: Record) -> dict[str, Any]:
    def plain(loss: float) -> float | None:
        return loss if math.isfinite(loss) else None

    return {**vars(record), "loss": plain(record.loss), "curve": [(at, plain(loss)) for at, loss in record.curve]}


def _from_json(read: dict[str, Any]) -> Record:
    def number(loss: float | None) -> float:
        return math.inf if loss is None else loss

    return Record(
        curve=tuple((at, number(loss)) for at, loss in read["curve"]),
        loss=number(read["loss"]),
        **{name: read[name] for name in ("seconds", "step_ms", "pass_ms", "skipped")},
    )
