"""The ``.idx`` beside a ``.bin``: what it says of the documents, and whether that can be true. Read by mapping.

megatron-core believes an index. A wrong one ends in an IndexError in the middle of a run, in memory that nobody wrote,
or in a loop without end; so all of it is looked at before a run, in pieces, at the cost of reading it once.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_START = len(_MAGIC) + _HEADER.size
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Of a token id in the .bin, by megatron-core's code; its floats (6 and 7) are left out."""
_PIECE = 1 << 20


class PairError(ValueError):
    """What is wrong with a pair, and the fix."""


@dataclass(frozen=True)
class Index:
    """The documents of ``prefix``.bin, as ``prefix``.idx has them.

    Attributes:
        prefix: of both files.
        type: of a token id, for numpy.
        lengths: tokens of each: [documents] int32.
        pointers: bytes before each: [documents] int64.
    """

    prefix: str
    type: str
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]

    def ids(self, document: int, data: NDArray[np.uint8]) -> NDArray[np.integer]:
        """Token ids of a document, out of the bytes of the .bin."""
        begin = int(self.pointers[document])
        length = int(self.lengths[document]) * np.dtype(self.type).itemsize
        return data[begin : begin + length].view(self.type)

    def pieces(self) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """(number of the first document, lengths in tokens, pointers) of some documents after others."""
        for first in range(0, len(self.lengths), _PIECE):
            piece = slice(first, first + _PIECE)
            yield first, self.lengths[piece].astype(np.int64), self.pointers[piece].astype(np.int64)

    def identity(self) -> str:
        """Changes with the number of documents and with the length of any of them."""
        check = 0
        for first in range(0, len(self.lengths), _PIECE):
            check = zlib.crc32(self.lengths[first : first + _PIECE].tobytes(), check)
        return f"{len(self.lengths)} documents, {check:08x}"

    def tokens(self, begin: int, end: int) -> int:
        """Tokens of the documents from ``begin`` to ``end``."""
        cuts = range(begin, end, _PIECE)
        return sum(int(self.lengths[cut : min(end, cut + _PIECE)].sum(dtype=np.int64)) for cut in cuts)


def read_index(prefix: str) -> Index:
    """The index of a pair, its header and size checked. Raises PairError, or OSError where it cannot be read."""
    path = Path(f"{prefix}.idx")
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(_START)
    if start[: len(_MAGIC)] != _MAGIC or len(start) < _START:
        raise PairError(f"{path} is no index of megatron-core's; preprocess the data again")
    version, code, documents, marks = _HEADER.unpack(start[len(_MAGIC) :])
    if version != 1:
        raise PairError(f"{path} has version {version}: only 1 is read; preprocess the data again")
    if code not in _TYPES:
        raise PairError(
            f"{path} says that its tokens are of type {code}: token ids are whole numbers, types "
            f"{', '.join(map(str, _TYPES))}; preprocess the data again"
        )
    expected = _START + documents * (4 + 8) + marks * 8
    if size < expected:
        raise PairError(f"{path} is truncated ({size} of {expected} bytes); preprocess the data again")
    if documents == 0:
        raise PairError(f"{path} holds no document; preprocess a text that is not empty")
    last = int(np.memmap(path, "<i8", "r", expected - 8, 1)[0]) if marks else None
    if last != documents:
        raise PairError(
            f"{path} ends its last document at sequence {last} of {documents}: it must be all of them; preprocess the "
            "data again"
        )
    lengths = np.memmap(path, "<i4", "r", _START, documents)
    pointers = np.memmap(path, "<i8", "r", _START + 4 * documents, documents)
    return Index(prefix, _TYPES[code], lengths, pointers)


def check_against_data(index: Index) -> None:
    """Raises PairError where the .bin cannot hold what ``index`` says, or that is no token at all."""
    data = Path(f"{index.prefix}.bin")
    size = data.stat().st_size
    width = np.dtype(index.type).itemsize
    needed = tokens = 0
    for first, lengths, pointers in index.pieces():
        bad = np.flatnonzero((lengths < 0) | (pointers < 0) | (pointers > 1 << 60))
        if len(bad):
            document = int(bad[0])
            raise PairError(
                f"{index.prefix}.idx is damaged: document {first + document} has {lengths[document]} tokens from byte "
                f"{pointers[document]} on; preprocess the data again"
            )
        needed = max(needed, int((pointers + lengths * width).max()))
        tokens += int(lengths.sum())
    if size < needed:
        raise PairError(
            f"{data} is truncated ({size} of the {needed} bytes its index counts); preprocess the data again"
        )
    if tokens == 0:
        raise PairError(f"{index.prefix}.idx holds no token in its documents; preprocess a text that is not empty")


def prefix_faults(prefix: str) -> list[str]:
    """What is wrong with the pair ``prefix``.bin, ``prefix``.idx, whatever the tokenizer."""
    missing = [path for path in (f"{prefix}.idx", f"{prefix}.bin") if not os.path.isfile(path)]
    if missing:
        hint = (
            "give the path without .bin or .idx" if prefix.endswith((".bin", ".idx")) else "preprocess_data.py makes it"
        )
        return [f"data path {prefix}: {' and '.join(missing)} missing; {hint}"]
    try:
        check_against_data(read_index(prefix))
        with open(f"{prefix}.bin", "rb"):
            pass
    except PairError as error:
        return [f"data path {prefix}: {error}"]
    except OSError as error:
        return [f"data path {prefix}: {error.filename} cannot be read ({error.strerror})"]
    return []


def part_faults(prefix: str, parts: list[float]) -> list[str]:
    """The parts of ``prefix`` that are asked for and get no token: megatron-core would count their epochs for ever.

    Args:
        prefix: of a pair without `prefix_faults`.
        parts: sizes of the training, validation and test part, as --split has them.
    """
    index = read_index(prefix)
    documents = len(index.lengths)
    ends = [round(sum(parts[: i + 1]) / sum(parts) * documents) for i in range(len(parts))]
    split = ",".join(f"{part:g}" for part in parts)
    faults = []
    for name, part, begin, end in zip(("training", "validation", "test"), parts, [0, *ends], ends, strict=False):
        if part and begin == end:
            faults.append(
                f"--split {split} leaves no document of the {documents} in {prefix} for {name}: make its part 0, or "
                "larger"
            )
        elif part and not index.tokens(begin, end):
            faults.append(
                f"--split {split} leaves documents {begin} to {end - 1} of {prefix} for {name}, which have no token: "
                "make its part 0, or larger"
            )
    return faults
