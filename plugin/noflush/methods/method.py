"""What a method's file defines: numbers of an update, its arithmetic, and its state before the first one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noflush.methods.matrices import Gather
from noflush.methods.table import METHODS, Row, load

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """The stage a method serves: ``stage`` s of ``stages`` P, its mean ``delay`` in updates (0 without asynchrony).

    ``slices``: the ranks that share it by tensor parallelism; None for one.
    """

    stage: int = 0
    stages: int = 1
    delay: float = 0.0
    slices: Gather | None = None


class Fused(NamedTuple):
    """The same rule for the Triton kernels of `kernels.fused`, which say what these functions take.

    Attributes:
        words: float32 numbers that ``coefficients`` stores.
        coefficients, rule, factor: `triton.jit` functions; ``factor`` None where the method keeps no product.
    """

    words: int
    coefficients: Any
    rule: Any
    factor: Any = None


@dataclass(frozen=True)
class Method:
    """An update rule.

    Attributes:
        name: of its row in `table.METHODS`.
        hyper: ``hyper(group, place)``: the hyper-parameters of a parameter group now, a NamedTuple of floats (what the
            device reads, in float64). Those that depend on the stage alone are worked out in it.
        coefficients: ``coefficients(hyper, step, product, gradient)``: the numbers of update ``step`` (from 1), a
            NamedTuple of floats whose first is the factor of every gradient, handed in (unscale times clip).
        rule: the arithmetic, in place. Of unit ``element``: ``rule(gradient, weights, target, state, c, master,
            seed, first)`` over tensors of one shape, as `elementwise` explains. Of unit ``matrix``:
            ``rule(gradients, weights, targets, states, sliced, c, master, seed)``: lists of whole tensors in
            their shapes (of a fused weight's [groups, rows of each, n]), of a tuple of state tensors each, and of how
            tensor parallelism has sliced each (`matrices.Piece`).
        factor: ``factor(hyper, step)``: what the running product is multiplied by at update ``step``; None: none is
            kept.
        fresh: ``fresh(p)``: the state of elements before their first update, where that is not zeros.
        state_shape: ``state_shape(name, shape, group)``: the shape of a state tensor of a parameter group's matrices;
            without elements where its hyper-parameters need none of that name. None: that of the weights. Whether it is
            that of the weights must not depend on their shape.
        fused: the rule for Triton, where the row says that there is one.
        still: ``still(c)``: of a method of matrices whose coefficients are the same at every step: those with which the
            rule changes nothing. A GPU then chooses between the two by itself when an update is to be skipped, with
            0-dim tensors in place of floats.
    """

    name: str
    hyper: Callable[[Mapping[str, Any], Place], Any]
    coefficients: Callable[[Any, Any, Any, Any], Any]
    rule: Callable[..., None]
    factor: Callable[[Any, float], float] | None = None
    fresh: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    state_shape: Callable[[str, Shape, Mapping[str, Any]], Shape] | None = None
    fused: Fused | None = None
    still: Callable[[Any], Any] | None = None

    @property
    def row(self) -> Row:
        """What the table says."""
        return METHODS[self.name]

    def cost(self, shape: Shape) -> float:
        """What an update of a matrix costs, in any unit, to share them out: operations, or elements.

        With the defaults: a run that goes on with other hyper-parameters has each matrix where its checkpoint has it.
        """
        rows, columns = shape[0], math.prod(shape[1:])
        return float(rows * columns) if self.row.flops is None else self.row.flops(rows, columns, self.row.values({}))

    def shape_of_state(self, name: str, shape: Shape, group: Mapping[str, Any]) -> Shape:
        """The shape of state tensor ``name`` of weights of ``shape`` in a parameter group."""
        return shape if self.state_shape is None else self.state_shape(name, shape, group)

    def new_state(self, p: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """State of elements ``p`` before their first update; zeros are of ``dtype`` (None: theirs)."""
        if self.fresh is not None:
            return self.fresh(p)
        return tuple(torch.zeros_like(p, dtype=dtype or p.dtype) for _ in self.row.state)


def method_of(name: str) -> Method:
    """The method of a name in the table. Raises KeyError for any other."""
    return load(name).METHOD
