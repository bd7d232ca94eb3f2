"""megatron-core's cached indices of samples: files that it loads as they are, pickles included."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def cache_faults(folder: str | None, prefixes: Sequence[str]) -> list[str]:
    """What is wrong with the cached indices in ``folder``, or where megatron-core keeps those of ``prefixes``."""
    folders = [Path(folder)] if folder else [Path(prefix) / "cache" / "GPTDataset_indices" for prefix in prefixes]
    paths = sorted(path for each in folders for path in each.glob("*.npy"))
    return [f"cached index {path}: {fault}" for path in paths if (fault := _fault(path)) is not None]


def _fault(path: Path) -> str | None:
    again = "delete it, it is made again"
    try:
        with path.open("rb") as stream:
            start = stream.read(6)
        if start and start != b"\x93NUMPY":
            return f"it is no array of numpy's, and megatron-core would run what it holds; {again}"
        np.lib.format.open_memmap(os.fspath(path), mode="r")
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, SyntaxError, EOFError):
        return f"it is incomplete or damaged; unless another run is writing it, {again}"
    return None
