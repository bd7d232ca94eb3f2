"""Real text without a download: the source of Python's standard library, or a file of the user's, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
_HELD_OUT = 10  # every tenth block of the text is for validation
_BLOCK = 1 << 16


def standard_library() -> bytes:
    """The source text of the standard library (top level and packages, tests left out), some 10 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    files = [f for f in sorted(root.rglob("*.py")) if not skipped & set(f.relative_to(root).parts)]
    return b"\n".join(f.read_bytes() for f in files)


def documents(path: str | None = None) -> list[str]:
    """The text of `corpus` in parts of 64 KiB.

    Raises ValueError as `corpus` does.
    """
    raw = standard_library() if path is None else _read(path)
    return [raw[at : at + _BLOCK].decode(errors="replace") for at in range(0, len(raw), _BLOCK)]


def corpus(path: str | None = None) -> tuple[Tensor, Tensor]:
    """Training and validation text, each a 1-dim uint8 tensor of bytes; validation is every tenth 64 KiB block.

    Raises ValueError if the file ``path`` cannot be read or is shorter than two blocks.
    """
    raw = standard_library() if path is None else _read(path)
    if len(raw) < 2 * _BLOCK:
        raise ValueError(f"the text has {len(raw)} bytes: at least {2 * _BLOCK} are needed to hold some out")
    blocks = torch.split(torch.frombuffer(bytearray(raw), dtype=torch.uint8), _BLOCK)
    held = [b for i, b in enumerate(blocks) if i % _HELD_OUT == 1]
    rest = [b for i, b in enumerate(blocks) if i % _HELD_OUT != 1]
    return torch.cat(rest), torch.cat(held)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"--text {path}: {error.strerror}; give a readable text file") from error


def batches(text: Tensor, batch: int, sequence: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows: (tokens, labels), each [batch, sequence] int64; the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - sequence - 1, (batch,), generator=draw)
        windows = torch.stack([text[s : s + sequence + 1] for s in starts.tolist()]).long()
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
