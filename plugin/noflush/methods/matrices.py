"""Which parameters are matrices, and which matrices a parameter is.

A rule that sees whole matrices is for hidden weights: not for embeddings, the output layer, biases and norms, which a
rule of elements updates. A fused weight is several matrices one below the other: query, key and value; gate and up.
Torch, no host: what a host or a model knows of a parameter it says with `set_matrix` and `set_cut`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
_IS_MATRIX = "noflush_is_matrix"
_CUT = "noflush_cut"
_GAP = "noflush_gap"
# As Megatron marks them, and as people name them.
_OUTSIDE = "is_embedding_or_output_parameter"
_NAMES = re.compile(r"(^|[._])(embed\w*|wte|wpe|lm_head|output_layer|head|logits|unembed\w*|vocab\w*)(\.|$)")


class Cut(NamedTuple):
    """A fused weight [groups * sum(rows), n]: in each of ``groups`` blocks of rows the first ``rows[0]`` are of the
    first matrix, and so on.

    One group stands for matrices one below the other; Megatron's fused attention weights have one for each group of
    query heads. Matrix i is [groups * rows[i], n].
    """

    groups: int
    rows: tuple[int, ...]


class Piece(NamedTuple):
    """A parameter, or a tensor in its shape, inside of a flat one.

    Attributes:
        offset: of its first element.
        shape: its shape.
        cut: how it is cut, if it is fused.
        sliced: 0 or 1: tensor parallelism has cut its rows or its columns, and this is one slice; None: it is whole.
    """

    offset: int
    shape: Shape
    cut: Cut | None = None
    sliced: int | None = None

    def of(self, flat: Tensor) -> Tensor:
        """The piece's view of ``flat``."""
        return flat[self.offset : self.offset + torch.Size(self.shape).numel()].view(self.shape)

    def matrices(self) -> list[Piece | Part]:
        """The matrices that it is."""
        if self.cut is None:
            return [self]
        ends = [sum(self.cut.rows[: i + 1]) for i in range(len(self.cut.rows))]
        return [Part(self, end - rows, end) for rows, end in zip(self.cut.rows, ends, strict=True)]


class Part(NamedTuple):
    """One matrix of a fused weight: rows [first, last) of each of its groups."""

    fused: Piece
    first: int
    last: int

    @property
    def sliced(self) -> int | None:
        """As of the fused weight."""
        return self.fused.sliced

    @property
    def shape(self) -> Shape:
        """(rows, columns) of the matrix."""
        assert self.fused.cut is not None
        return self.fused.cut.groups * (self.last - self.first), self.fused.shape[-1]

    def of(self, flat: Tensor) -> Tensor:
        """The matrix's view of ``flat``: [groups, rows of each, n]."""
        assert self.fused.cut is not None
        blocks = self.fused.of(flat).view(self.fused.cut.groups, -1, self.fused.shape[-1])
        return blocks[:, self.first : self.last]


def piece_of(p: Tensor, offset: int = 0) -> Piece:
    """Where parameter ``p`` lies, if its first element is at ``offset``."""
    sliced = (
        getattr(p, "partition_dim", -1) if getattr(p, "tensor_model_parallel", False) else -1
    )  # as Megatron says it
    return Piece(offset, tuple(p.shape), getattr(p, _CUT, None), sliced if sliced in (0, 1) else None)


def set_cut(p: Tensor, groups: int, rows: Sequence[int]) -> None:
    """Says that ``p`` is a fused weight. Raises ValueError if so many rows do not make it up."""
    if p.dim() != 2 or groups * sum(rows) != p.shape[0]:
        raise ValueError(
            f"a weight of shape {tuple(p.shape)} is said to be {groups} groups of {' + '.join(map(str, rows))} rows, "
            f"which are {groups * sum(rows)}: it must have so many rows and two dimensions"
        )
    setattr(p, _CUT, Cut(groups, tuple(rows)))


def set_gap(p: Tensor) -> None:
    """Says that ``p`` only fills a gap between others: no rule sees it."""
    setattr(p, _GAP, True)


def is_gap(p: Tensor) -> bool:
    """Whether ``p`` only fills a gap."""
    return bool(getattr(p, _GAP, False))


def is_matrix(p: Tensor) -> bool:
    """Whether a rule of matrices updates ``p``: it has two dimensions, and nobody says that it is none."""
    return p.dim() == 2 and min(p.shape) > 1 and getattr(p, _IS_MATRIX, True) and not getattr(p, _OUTSIDE, False)


def set_matrix(p: Tensor, value: bool) -> None:
    """Says whether a rule of matrices updates ``p``."""
    setattr(p, _IS_MATRIX, value)


def mark_embeddings_and_heads(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Says of embeddings and output layers among named ``modules`` that a rule of elements updates them.

    Embeddings by their class, output layers by their name (``head``, ``lm_head``, ``output_layer``, ``logits``).
    Returns the parameters' names.
    """
    found = []
    for name, module in modules:
        for leaf, p in module.named_parameters(recurse=False):
            embeds = "embedding" in type(module).__name__.lower()
            if p.dim() == 2 and (embeds or _NAMES.search(name)):
                set_matrix(p, False)
                found.append(f"{name}.{leaf}" if name else leaf)
    return found


def split_groups(groups: Iterable[Any], method: str, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameters, or groups of them, as groups of matrices and groups of the rest.

    Args:
        groups: what torch's optimizers take.
        method: updates the rest.
        given: what a group of the rest gets besides.
    """
    listed = list(groups)
    if listed and not isinstance(listed[0], dict):
        listed = [{"params": listed}]
    made = []
    for group in listed:
        if "method" in group:
            made.append(group)
            continue
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        halves = [p for p in params if is_matrix(p)], [p for p in params if not is_matrix(p)]
        if halves[0]:
            made.append({**group, "params": halves[0]})
        if halves[1]:
            made.append({**given, **group, "params": halves[1], "method": method})
    return made


class Gather(Protocol):
    """The ranks that each hold a slice of a stage's matrices."""

    @property
    def rank(self) -> int:
        """This one's place."""

    @property
    def size(self) -> int:
        """How many there are."""

    def gather(self, t: Tensor, dim: int) -> Tensor:
        """All ranks' ``t``, one behind the other along ``dim``, on all of them."""


def by_shape(tensors: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Matrices of one shape together: their places in ``tensors``, and a new tensor [how many, rows, n] of them.

    A matrix may be a view [groups, rows of each, n].
    """
    kinds: dict[Shape, list[int]] = {}
    for i, t in enumerate(tensors):
        kinds.setdefault((t.shape[:-1].numel(), t.shape[-1]), []).append(i)
    for shape, places in kinds.items():
        yield places, torch.stack([tensors[i].reshape(shape) for i in places])
