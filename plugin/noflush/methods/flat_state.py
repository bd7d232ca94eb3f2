"""Where a method's state lies, in flat tensors of which every parameter's entry in ``Optimizer.state`` is a view."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noflush.methods.flat import FlatGroup
from noflush.methods.matrices import Part, Piece
from noflush.methods.method import Method

Places = tuple[Piece | Part, ...]
_OBLONG = (101, 103)  # as no matrix is


class Laid(NamedTuple):
    """Where the state of some matrices lies.

    Attributes:
        places: of each matrix's state, in the row's order.
        lengths: of each flat state tensor.
        alike: of each, whether it lies as the weights do, which hosts can read.
    """

    places: tuple[Places, ...]
    lengths: tuple[int, ...]
    alike: tuple[bool, ...]

    def owned(self, counts: Sequence[int]) -> list[tuple[Places, ...]]:
        """``places`` of each of some parameters, which are so many matrices each."""
        ends = list(itertools.accumulate(counts, initial=0))
        return [self.places[first:end] for first, end in itertools.pairwise(ends)]


def lay_out(method: Method, matrices: Sequence[Piece | Part], numel: int, group: Mapping[str, Any]) -> Laid:
    """Of ``matrices`` in a flat tensor of ``numel`` elements: state of their shapes as they lie, other in a row.

    ``group``: their hyper-parameters.
    """
    columns: list[list[Piece | Part]] = []
    lengths, alike = [], []
    for name in method.row.state:
        shapes = [method.shape_of_state(name, matrix.shape, group) for matrix in matrices]
        # By the name alone, and not by whether all of these are square: no shard has it otherwise.
        same = method.shape_of_state(name, _OBLONG, group) == _OBLONG
        in_a_row, offset = [], 0
        for shape in shapes:
            in_a_row.append(Piece(offset, shape))
            offset += torch.Size(shape).numel()
        columns.append(list(matrices) if same else list(in_a_row))
        lengths.append(numel if same else offset)
        alike.append(same)
    return Laid(tuple(zip(*columns, strict=True)), tuple(lengths), tuple(alike))


@dataclass
class FlatState:
    """A flat group's state.

    Attributes:
        where: the group.
        method: its rule.
        tensors: flat state, in the row's order.
        clock: float32 [2], (updates made, running product).
        laid: of a method of matrices where each one's state lies; None: of elements, where those do.
        true: the true weights, where forwards compute with others (`look_ahead`) and no master holds them; else None.
    """

    where: FlatGroup
    method: Method
    tensors: tuple[Tensor, ...]
    clock: Tensor
    laid: Laid | None
    true: Tensor | None = None

    @property
    def matrices(self) -> tuple[Piece | Part, ...]:
        """What a rule of matrices sees."""
        return tuple(matrix for piece in self.where.pieces or () for matrix in piece.matrices())

    def views(self, index: int) -> list[Tensor]:
        """State of parameter ``index`` of the group."""
        if self.laid is None:
            piece = Piece(self.where.offsets[index], tuple(self.where.params[index].shape))
            return [piece.of(t) for t in self.tensors]
        if not self.where.by_parameter:
            return list(self.tensors)  # of a shard of many
        assert self.where.pieces is not None
        pieces = self.where.pieces
        mine = self.laid.owned([len(piece.matrices()) for piece in pieces])[index]
        return [
            pieces[index].of(t) if alike else _in_a_row([places[k] for places in mine], t)
            for k, (t, alike) in enumerate(zip(self.tensors, self.laid.alike, strict=True))
        ]

    def start(self, index: int) -> None:
        """Fills in the state of parameter ``index`` as it is before the first update."""
        p = self.where.params[index]
        if self.method.fresh is None:
            for view in self.views(index):
                view.zero_()
        else:
            for view, value in zip(self.views(index), self.method.fresh(p), strict=True):
                view.copy_(value)


def _in_a_row(places: Sequence[Piece | Part], t: Tensor) -> Tensor:
    """State of one parameter that does not lie as its weights: of one matrix in its shape, of several flat."""
    (place, *more) = places
    return t.narrow(0, *span(places)) if more or not isinstance(place, Piece) else place.of(t)


def span(places: Sequence[Piece | Part]) -> tuple[int, int]:
    """Where state in a row begins, and how long it is; ``places``: of one parameter's matrices."""
    first = places[0]
    assert isinstance(first, Piece), "state in a row lies in pieces"
    return first.offset, sum(torch.Size(place.shape).numel() for place in places)


def dtype_of(group: Mapping[str, Any]) -> torch.dtype | None:
    """In which elements' state that starts at zero is kept; None: the weights'."""
    return torch.bfloat16 if group.get("moments") == "bf16" else None


def flat_state(where: FlatGroup, method: Method, clock: Tensor, group: Mapping[str, Any]) -> FlatState:
    """State of a flat group with the hyper-parameters ``group``, before its first update; elements' in `dtype_of` it.

    Raises RuntimeError for a matrix that a shard cuts in two.
    """
    like = where.params[0].detach()
    if method.row.unit == "element":
        tensors = tuple(t.zero_() for t in method.new_state(like.new_zeros(where.numel), dtype_of(group)))
        return FlatState(where, method, tensors, clock, None)
    if where.pieces is None:
        raise RuntimeError(f"{method.name} sees whole matrices, and a shard of them is cut by elements")
    laid = lay_out(method, [matrix for piece in where.pieces for matrix in piece.matrices()], where.numel, group)
    return FlatState(where, method, tuple(like.new_zeros(length) for length in laid.lengths), clock, laid)
