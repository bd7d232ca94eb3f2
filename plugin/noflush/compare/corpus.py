"""The tokens of a comparison: training, and two parts of held-out text, one to search on and one to report."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from noflush.compare.settings import Part, Task
from noflush.demo import text

_SAMPLE = 1 << 18
"""Ids at each end of a text that are looked at: all of a long one would take minutes."""


@dataclass(frozen=True)
class Corpus:
    """1-dim tensors of token ids."""

    training: Tensor
    held_out: dict[Part, Tensor]

    @property
    def digest(self) -> str:
        """Of its sizes, and of the ids at the ends of each part."""
        found = hashlib.sha256()
        for ids in (self.training, *self.held_out.values()):
            found.update(f"{ids.dtype} {len(ids)} ".encode())
            for end in (ids[:_SAMPLE], ids[-_SAMPLE:]):
                found.update(bytes(end.contiguous().view(torch.uint8).tolist()))
        return found.hexdigest()[:16]


def load(task: Task) -> Corpus:
    """The corpus of a task. Raises ValueError for files that cannot be read or are too short."""
    if task.data is None:
        training, held = text.corpus(task.text)
    else:
        ids = token_ids(task.data, task.vocabulary)
        cut = len(ids) - len(ids) // 10
        training, held = ids[:cut], ids[cut:]
    half = len(held) // 2
    if min(half, len(training)) < 2 * task.sequence + 2:
        raise ValueError(
            f"--sequence {task.sequence}: each half of the held-out text has {half} tokens; give a longer text"
        )
    return Corpus(training, {"search": held[:half], "report": held[half:]})


def token_ids(path: str, vocabulary: int) -> Tensor:
    """The ids of a flat file, mapped: uint8 for a vocabulary up to 256, uint16 up to 65,536, else int32.

    Raises ValueError if it cannot be read, is empty, or an id at its start or its end is not in the vocabulary.
    """
    dtype = torch.uint8 if vocabulary <= 1 << 8 else torch.uint16 if vocabulary <= 1 << 16 else torch.int32
    try:
        size = Path(path).stat().st_size
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        raise ValueError(f"--data {path}: {error.strerror}; give a readable file of token ids") from error
    count = size // dtype.itemsize
    if not count or size % dtype.itemsize:
        raise ValueError(
            f"--data {path}: {size} bytes are no ids of {dtype.itemsize} bytes, as a vocabulary of "
            f"{vocabulary} has; check --vocabulary"
        )
    ids = torch.from_file(path, shared=False, size=count, dtype=dtype)
    for end in (ids[:_SAMPLE], ids[-_SAMPLE:]):
        largest, smallest = int(end.int().max()), int(end.int().min())
        if largest >= vocabulary or smallest < 0:
            raise ValueError(
                f"--data {path}: id {largest if largest >= vocabulary else smallest} is not in a vocabulary of "
                f"{vocabulary}; give the tokenizer's size as --vocabulary"
            )
    return ids
