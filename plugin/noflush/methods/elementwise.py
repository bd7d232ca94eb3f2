"""What element-wise rules share, in plain torch operations, which are the oracle of the other kernels.

Such a rule takes tensors of one shape and updates them in place:

- ``gradient``: any floating dtype; only read;
- ``weights``: float32 (float64 in tests). With ``master`` they are updated in place and ``target``, the next weight
  version in the model's dtype, gets them rounded; without, only ``target`` is written (it may be ``weights``);
- ``state``: its tensors; moments may be bfloat16, and are then rounded stochastically with noise from ``seed``;
- ``c``: the method's coefficients, floats, or 0-dim float32 tensors where a compiled graph must not specialise;
- ``first``: the index of element 0 (for the noise).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def noise(index: Tensor, seed: Any) -> Tensor:
    """32 pseudo-random bits for each int64 ``index`` and ``seed``: Wellons' low-bias integer hash, in int64.

    The Triton kernel computes the same in uint32, so that both round alike.
    """
    x = (index + seed * 0x9E3779B9) & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    mixed: Tensor = x ^ (x >> 16)
    return mixed


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16, up with the probability of the part cut off; ``bits`` are 16 random bits each (int64)."""
    words = values.view(torch.int32).long() + bits
    return (words & ~0xFFFF).to(torch.int32).view(torch.float32).to(torch.bfloat16)


def _store_moments(moments: tuple[tuple[Tensor, Tensor], ...], seed: Any, first: int) -> None:
    for which, (kept, value) in enumerate(moments):
        if kept.dtype == torch.bfloat16:
            index = torch.arange(first, first + kept.numel(), device=kept.device).view(kept.shape)
            bits = noise(index, seed)
            kept.copy_(round_stochastically(value, bits & 0xFFFF if which == 0 else bits >> 16))


def move_moments(gradient: Tensor, weights: Tensor, state: tuple[Tensor, ...], c: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient, first, second moment) in the weights' dtype, the moments moved on; in place if of that dtype."""
    g = gradient.to(weights.dtype) * c.gradient
    m, v = state[0].to(weights.dtype), state[1].to(weights.dtype)
    m.lerp_(g, c.average)
    v.mul_(c.beta2).addcmul_(g * c.one_minus_beta2, g)
    return g, m, v


def look(weights: Tensor, before: Tensor, target: Tensor, ahead: Any) -> None:
    """The look-ahead: ``target`` is ``ahead`` steps beyond ``weights``, of the step that they have just made."""
    target.copy_(weights + (weights - before) * ahead)


def finish(
    new: Tensor,
    target: Tensor,
    moments: tuple[tuple[Tensor, Tensor], ...],
    master: bool,
    seed: Any,
    first: int,
) -> None:
    """Stores what a rule has computed: ``new`` weights, and (where it is kept, value) of each moment."""
    _store_moments(moments, seed, first)
    if master:
        target.copy_(new)
