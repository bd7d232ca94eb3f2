"""Checks of the files that arguments name, before any process group or weight: the tokenizer's and the data's."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from noflush.launch.arguments.settings import Data, Settings
from noflush.launch.data.cache import cache_faults
from noflush.launch.data.index import part_faults, prefix_faults
from noflush.launch.data.token_ids import vocabulary_faults


def paths_from_files(
    together: str | None, by_split: str | None, blend: Any, splits: tuple[Any, ...], faults: list[str]
) -> tuple[Any, tuple[Any, ...]]:
    """``--data-args-path`` (words as behind --data-path) and ``--per-split-data-args-path`` (JSON), read."""
    try:
        if together:
            blend = Path(together).read_text().split()
        if by_split:
            found = json.loads(Path(by_split).read_text())
            splits = tuple(found.get(name) for name in ("train", "valid", "test"))
            if any(isinstance(split, str) for split in splits):
                faults.append(f"--per-split-data-args-path {by_split}: give a list of prefixes for each split")
                splits = None, None, None
    except (OSError, ValueError, AttributeError) as error:
        faults.append(f"the file of data paths cannot be read: {error}")
    return blend, splits


def file_faults(settings: Settings) -> list[str]:
    """What is wrong with the files that ``settings`` name."""
    faults = []
    tokens, data, checkpoints = settings.tokens, settings.data, settings.checkpoints
    for option, path in (("--vocab-file", tokens.vocab_file), ("--merge-file", tokens.merge_file)):
        if path is not None and not Path(path).is_file():
            faults.append(f"{option} {path} is no file")
    prefixes = all_prefixes(data, faults)
    for prefix in prefixes:
        faults += prefix_faults(prefix)
    faults += cache_faults(data.cache, prefixes)
    if data.split is not None and not _is_split(data.split):
        faults.append(f"--split {data.split}: give three parts such as 969,30,1, of which some is more than 0")
    elif data.split is not None and not faults:
        faults += [fault for prefix in prefixes for fault in part_faults(prefix, _parts(data.split))]
    if checkpoints.save:
        fault = _unwritable(checkpoints.save)
        if fault:
            faults.append(f"--save {checkpoints.save}: {fault}")
    return faults


def token_id_faults(data: Data, vocabulary: int) -> list[str]:
    """Data that another tokenizer made than the run's, whose ``vocabulary`` is this large; files without faults."""
    return [fault for prefix in all_prefixes(data) for fault in vocabulary_faults(prefix, vocabulary)]


def all_prefixes(data: Data, faults: list[str] | None = None) -> list[str]:
    """Every prefix once; what is wrong with their weights goes into ``faults``."""
    found = [] if faults is None else faults
    return list(dict.fromkeys(p for blend in (data.blend, *(data.splits or ())) for p in _prefixes(blend, found)))


def _prefixes(blend: Sequence[str] | None, faults: list[str]) -> list[str]:
    """The prefixes of a blend, which may alternate with weights."""
    if not blend:
        return []
    if len(blend) == 1:
        return list(blend)
    weighted = all(_is_weight(word) for word in blend[::2]) and len(blend) % 2 == 0
    if weighted:
        if not any(float(word) for word in blend[::2]):
            faults.append(f"data paths {' '.join(blend)}: every weight is 0; give one of them more")
        return list(blend[1::2])
    if any(_is_weight(word) and not Path(f"{word}.idx").is_file() for word in blend):
        faults.append(f"data paths {' '.join(blend)}: give prefixes alone, or a weight before every prefix")
        return []
    return list(blend)


def _is_weight(word: str) -> bool:
    try:
        return float(word) >= 0
    except ValueError:
        return False


def _is_split(split: str) -> bool:
    try:
        parts = _parts(split)
    except ValueError:
        return False
    return 1 <= len(parts) <= 3 and min(parts) >= 0 and 0 < sum(parts) < math.inf


def _parts(split: str) -> list[float]:
    # Scripts that build their arguments in an array pass quotes on, and megatron-core overlooks them.
    return [float(part) for part in split.strip("'\"").replace("/", ",").split(",")]


def _unwritable(folder: str) -> str | None:
    path = Path(folder)
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        return f"{path} is no folder"
    return None if os.access(path, os.W_OK) else f"{path} cannot be written to"
