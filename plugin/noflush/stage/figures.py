"""What a stage tells those behind it with every call's header, so that the last stage can log for all of them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

_WORDS = 4


@dataclass(frozen=True)
class StageFigures:
    """One stage's figures as it knew them when it opened a call.

    Attributes:
        norm: gradient norm of its newest update that has been read, unscaled and before clipping; nan before any. Where
            stages share one norm (tied layers), the first stage tells it and the others 0.
        skipped: updates skipped so far.
        busy_ns: nanoseconds of compute since the run began.
        spent_ns: nanoseconds in `train_batch` since the run began.
    """

    norm: float
    skipped: int
    busy_ns: int
    spent_ns: int

    def words(self) -> list[int]:
        """Four whole numbers that a header can carry."""
        (bits,) = struct.unpack("<q", struct.pack("<d", self.norm))
        return [bits, self.skipped, self.busy_ns, self.spent_ns]


def read_figures(words: Sequence[int]) -> tuple[StageFigures, ...]:
    """The figures of several stages from their words, one after the other."""
    found = []
    for at in range(0, len(words), _WORDS):
        bits, skipped, busy, spent = words[at : at + _WORDS]
        (norm,) = struct.unpack("<d", struct.pack("<q", bits))
        found.append(StageFigures(norm, skipped, busy, spent))
    return tuple(found)
