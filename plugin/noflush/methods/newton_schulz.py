"""Newton-Schulz: the orthogonal matrix nearest to a matrix, roughly, by products alone; many of equal shape at once.

Jordan et al., "Muon" (2024): X <- a X + b (X X') X + c (X X')^2 X with a = 3.4445, b = -4.7750, c = 2.0315, five times
from X = G / |G|, brings every singular value to between 0.7 and 1.2. Every factor is a polynomial of X X', so of a wide
matrix [m, n] it is cheaper to work on that [m, m] product alone and to multiply with G once at the end ("Gram
Newton-Schulz"): 2 m^2 n + (4 steps - 3) m^3 products in place of the steps (2 m^2 n + m^3) of `flops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from noflush.methods.flops import GRAM_FROM
from noflush.methods.matrices import Gather, by_shape

_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPS = 1e-7


def orthogonalized(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Each of ``matrices``, [m, n] or [groups, rows, n] as one of groups * rows, orthogonalized: float32, their shapes.

    In bfloat16 on a GPU, in float32 on a CPU, where the products of the Gram form keep enough digits.
    """
    found: list[Tensor] = [torch.empty(0)] * len(matrices)
    for places, stacked in by_shape(matrices):
        for place, result in zip(places, _orthogonal(stacked, steps), strict=True):
            found[place] = result.reshape(matrices[place].shape)
    return found


def orthogonalized_whole(
    matrices: Sequence[Tensor], sliced: Sequence[int | None], steps: int, slices: Gather
) -> list[Tensor]:
    """As `orthogonalized`, of matrices that tensor parallelism has cut: each is put together first, on every rank.

    Args:
        sliced: of each matrix along which dimension it is cut; None: every rank holds it whole.
        slices: the ranks that hold the slices; all call this at once, for equal lists.

    Returns this rank's slices. In which order rows or columns are put together changes nothing of a slice.
    """
    found: list[Tensor] = [torch.empty(0)] * len(matrices)
    for dim in (None, 0, 1):
        mine = [i for i, found_dim in enumerate(sliced) if found_dim == dim]
        for places, stacked in by_shape([matrices[i] for i in mine]):
            if dim is None:
                whole = _orthogonal(stacked, steps)
            else:
                own = stacked.shape[dim + 1]
                gathered = slices.gather(stacked, dim + 1)
                whole = _orthogonal(gathered, steps).narrow(dim + 1, slices.rank * own, own)
            for place, result in zip(places, whole, strict=True):
                found[mine[place]] = result.reshape(matrices[mine[place]].shape)
    return found


def _orthogonal(stacked: Tensor, steps: int) -> Tensor:
    """Of matrices of one shape, [how many, m, n]."""
    tall = stacked.shape[-2] > stacked.shape[-1]
    x = stacked.transpose(-1, -2) if tall else stacked
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    if x.device.type != "cpu":
        x = _iterated(x.bfloat16(), steps).float()
    elif x.shape[-1] >= GRAM_FROM * x.shape[-2]:
        x = _gram(x, steps)
    else:
        x = _iterated(x, steps)
    return x.transpose(-1, -2) if tall else x


def _iterated(x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=_B, alpha=_C), x, beta=_A)
    return x


def _gram(x: Tensor, steps: int) -> Tensor:
    gram, product = x @ x.mT, None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        factor.diagonal(dim1=-2, dim2=-1).add_(_A)
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram = factor @ gram @ factor
    return x if product is None else product @ x
