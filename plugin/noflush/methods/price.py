"""What a method costs a stage, in memory and in time, before anything is started. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from noflush.methods.flops import forward_and_backward
from noflush.methods.table import METHODS

Shape = tuple[int, int]
_FLOAT32 = 4


@dataclass(frozen=True)
class StageShapes:
    """What a stage has to learn: ``matrices`` as (rows, columns), and so many numbers in embeddings, norms, biases."""

    matrices: tuple[Shape, ...]
    others: int

    @property
    def numbers(self) -> int:
        """All of them."""
        return sum(rows * columns for rows, columns in self.matrices) + self.others


@dataclass(frozen=True)
class Price:
    """Of one method at one stage.

    Attributes:
        state_bytes: of the optimizer's state.
        look_ahead_bytes: more with a look-ahead, where no master weights hold the true ones.
        update_share: floating-point operations of an update over those of the forwards and backwards before it.
    """

    state_bytes: int
    look_ahead_bytes: int
    update_share: float


def gpt_stage(layers: int, hidden: int, others: int) -> StageShapes:
    """A stage of ``layers`` transformer layers: query, key, value, output, and an MLP four times as wide."""
    one = ((hidden, hidden),) * 4 + ((4 * hidden, hidden), (hidden, 4 * hidden))
    return StageShapes(one * layers, others)


def price(method: str, stage: StageShapes, tokens: int, masters: bool = False, **params: Any) -> Price:
    """What ``method`` costs a stage that updates after ``tokens`` tokens; ``masters``: of mixed precision.

    ``params``: hyper-parameters that are not at their defaults.

    Raises KeyError for a name that no row has.
    """
    row = METHODS[method]
    matrices: Sequence[Shape] = stage.matrices if row.unit == "matrix" else ()
    rest = METHODS[row.rest] if row.rest is not None else row
    group = row.values(params)
    kept = sum(row.numbers_kept(*shape, group) for shape in matrices)
    inside = sum(rows * columns for rows, columns in matrices)
    kept += len(rest.state) * (stage.numbers - inside)
    work = sum(row.flops(*shape, group) for shape in matrices) if row.flops else 0.0
    learning = sum(forward_and_backward(*shape, tokens) for shape in stage.matrices)
    return Price(
        state_bytes=_FLOAT32 * kept,
        look_ahead_bytes=0 if masters else _FLOAT32 * stage.numbers,
        update_share=work / learning if learning else 0.0,
    )
