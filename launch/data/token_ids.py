"""Whether token ids belong to the tokenizer: ids of data that another one made are refused, never looked up."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from noflush.launch.data.index import read_index

_TOKENS = 1 << 18
_DOCUMENTS = 1 << 12


def first_outside(ids: NDArray[np.integer[Any]], vocabulary: int) -> int | None:
    """Position of the first id that is below 0 or not below ``vocabulary``; None if there is none."""
    # Read as unsigned, what is below 0 is above all others: one pass instead of two.
    if not len(ids) or int(ids.view(f"u{ids.itemsize}").max()) < vocabulary:
        return None
    return int(np.flatnonzero((ids < 0) | (ids >= vocabulary))[0])


def fault(prefix: str, document: int, position: int, token: int, vocabulary: int) -> str:
    """The sentence about an id that `first_outside` has found."""
    return (
        f"data path {prefix}: document {document} has token id {token} at position {position}, outside the tokenizer's "
        f"vocabulary, 0 to {vocabulary - 1}; name the tokenizer that made the data, or preprocess it with this one"
    )


def vocabulary_faults(prefix: str, vocabulary: int) -> list[str]:
    """An id outside the vocabulary among the first documents of a pair without `prefix_faults`.

    Enough to find another tokenizer's data before a run starts; `datasets` looks at every id that is pulled.
    """
    index = read_index(prefix)
    if not os.path.getsize(f"{prefix}.bin"):
        return []
    data = np.memmap(f"{prefix}.bin", np.uint8, "r")
    seen = 0
    for document in range(min(len(index.lengths), _DOCUMENTS)):
        ids = index.ids(document, data)[: _TOKENS - seen]
        at = first_outside(ids, vocabulary)
        if at is not None:
            return [fault(prefix, document, at, int(ids[at]), vocabulary)]
        seen += len(ids)
        if seen >= _TOKENS:
            break
    return []
