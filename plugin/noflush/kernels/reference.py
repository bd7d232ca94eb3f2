"""The update rules in plain torch operations: the oracle, what `torch.compile` compiles, and the ``torch`` kernel.

Each takes tensors of one shape and updates them in place:

- ``gradient``: any floating dtype; zeroed if ``zero`` is true;
- ``weights``: float32 (float64 in tests). With ``master`` they are updated in place and ``target``, the next weight
  version in the model's dtype, gets them rounded; without, only ``target`` is written (it may be ``weights``);
- the state tensors; moments may be bfloat16, and are then rounded stochastically with noise from ``seed``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from noflush.kernels.scalars import Coefficients, RuleName

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


def _store(moments: tuple[tuple[Tensor, Tensor], ...], seed: Any, first: int) -> None:
    for which, (kept, value) in enumerate(moments):
        if kept.dtype == torch.bfloat16:
            index = torch.arange(first, first + kept.numel(), device=kept.device).view(kept.shape)
            bits = noise(index, seed)
            kept.copy_(round_stochastically(value, bits & 0xFFFF if which == 0 else bits >> 16))


def _move_moments(
    gradient: Tensor, weights: Tensor, state: tuple[Tensor, ...], c: Coefficients
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient, first, second moment) in the weights' dtype, the moments moved on; in place if of that dtype."""
    g = gradient.to(weights.dtype) * c.gradient
    m, v = state[0].to(weights.dtype), state[1].to(weights.dtype)
    m.lerp_(g, c.average)
    v.mul_(c.beta2).addcmul_(g * c.one_minus_beta2, g)
    return g, m, v


def nadamw(
    gradient: Tensor,
    weights: Tensor,
    target: Tensor,
    state: tuple[Tensor, ...],
    c: Coefficients,
    master: bool,
    zero: bool,
    seed: Any = 0,
    first: int = 0,
) -> None:
    """NAdam with decoupled decay; ``state`` is (exp_avg, exp_avg_sq), ``first`` element 0's index (for the noise)."""
    g, m, v = _move_moments(gradient, weights, state, c)
    denominator = (v / c.bias2).sqrt() + c.eps
    new = weights if master else target
    new.copy_(weights * c.decay)
    new.addcdiv_(g * c.of_gradient, denominator).addcdiv_(m * c.of_momentum, denominator)
    _finish(gradient, new, target, ((state[0], m), (state[1], v)), master, zero, seed, first)


def adamw(
    gradient: Tensor,
    weights: Tensor,
    target: Tensor,
    state: tuple[Tensor, ...],
    c: Coefficients,
    master: bool,
    zero: bool,
    seed: Any = 0,
    first: int = 0,
) -> None:
    """AdamW in the order of torch's own; arguments as `nadamw`."""
    _, m, v = _move_moments(gradient, weights, state, c)
    denominator = v.sqrt() / c.bias2 + c.eps
    new = weights if master else target
    new.copy_(weights * c.decay)
    new.addcdiv_(m * c.of_momentum, denominator)
    _finish(gradient, new, target, ((state[0], m), (state[1], v)), master, zero, seed, first)


def nag(
    gradient: Tensor,
    weights: Tensor,
    target: Tensor,
    state: tuple[Tensor, ...],
    c: Coefficients,
    master: bool,
    zero: bool,
    seed: Any = 0,
    first: int = 0,
) -> None:
    """Eq 10 at the look-ahead point; ``state`` is (weight,), which is w_t itself. Other arguments as `nadamw`."""
    (weight,) = state
    g = gradient.to(weights.dtype) * c.gradient
    new = weights if master else target
    new.copy_(weights * c.decay)
    new.add_(g * c.of_gradient)
    drift = new - weight
    weight.copy_(new)
    new.add_(drift * c.of_momentum)
    _finish(gradient, new, target, (), master, zero, seed, first)


def _finish(
    gradient: Tensor,
    new: Tensor,
    target: Tensor,
    moments: tuple[tuple[Tensor, Tensor], ...],
    master: bool,
    zero: bool,
    seed: Any,
    first: int,
) -> None:
    _store(moments, seed, first)
    if master:
        target.copy_(new)
    if zero:
        gradient.zero_()


RULES: dict[RuleName, Callable[..., None]] = {"nadamw": nadamw, "adamw": adamw, "nag": nag}
