"""Checks of the files that arguments name, before any process group or weight: the tokenizer's and the data's."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from noflush.launch.arguments.settings import Settings

_HEADER = b"MMIDIDX\x00\x00"
# Bytes a token, by megatron-core's code in the index.
_WIDTH = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}


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
    prefixes = [p for blend in (data.blend, *(data.splits or ())) for p in _prefixes(blend, faults)]
    for prefix in prefixes:
        faults += prefix_faults(prefix)
    if data.split is not None and not _is_split(data.split):
        faults.append(f"--split {data.split}: give three parts such as 969,30,1, of which some is more than 0")
    elif data.split is not None and not faults:
        faults += [fault for prefix in prefixes for fault in _empty_parts(prefix, data.split)]
    if checkpoints.save:
        fault = _unwritable(checkpoints.save)
        if fault:
            faults.append(f"--save {checkpoints.save}: {fault}")
    return faults


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


def _empty_parts(prefix: str, split: str) -> list[str]:
    """A part that is asked for and gets no document: megatron-core would count its epochs for ever."""
    with Path(f"{prefix}.idx").open("rb") as stream:
        (documents,) = struct.unpack("<Q", stream.read(26)[18:])
    parts = _parts(split)
    ends = [round(sum(parts[: i + 1]) / sum(parts) * documents) for i in range(len(parts))]
    empty = [
        name
        for name, part, begin, end in zip(("training", "validation", "test"), parts, [0, *ends], ends, strict=False)
        if part and begin == end
    ]
    return [
        f"--split {split} leaves no document of the {documents} in {prefix} for {name}: make its part 0, or larger"
        for name in empty
    ]


def prefix_faults(prefix: str) -> list[str]:
    """What is wrong with the pair ``prefix``.bin, ``prefix``.idx."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    missing = [str(path) for path in (index, data) if not path.is_file()]
    if missing:
        hint = (
            "give the path without .bin or .idx" if prefix.endswith((".bin", ".idx")) else "preprocess_data.py makes it"
        )
        return [f"data path {prefix}: {' and '.join(missing)} missing; {hint}"]
    with index.open("rb") as stream:
        start = stream.read(34)
        if start[:9] != _HEADER or len(start) < 34:
            return [f"data path {prefix}: {index} is no index of megatron-core's; preprocess the data again"]
        code, sequences, documents = struct.unpack("<BQQ", start[17:34])
        expected = 34 + sequences * (4 + 8) + documents * 8
        if index.stat().st_size < expected or code not in _WIDTH:
            return [f"data path {prefix}: {index} is truncated ({index.stat().st_size} of {expected} bytes)"]
        if sequences == 0:
            return [f"data path {prefix}: it holds no document"]
        stream.seek(34 + 4 * (sequences - 1))
        (length,) = struct.unpack("<i", stream.read(4))
        stream.seek(34 + 4 * sequences + 8 * (sequences - 1))
        (pointer,) = struct.unpack("<q", stream.read(8))
    needed = pointer + length * _WIDTH[code]
    if data.stat().st_size < needed:
        return [
            f"data path {prefix}: {data} is truncated ({data.stat().st_size} of the {needed} bytes its index counts); "
            "preprocess the data again"
        ]
    return []


def _unwritable(folder: str) -> str | None:
    path = Path(folder)
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        return f"{path} is no folder"
    return None if os.access(path, os.W_OK) else f"{path} cannot be written to"
