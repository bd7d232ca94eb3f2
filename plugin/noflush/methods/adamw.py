"""`PipeDreamAdamW`: AdamW as it is, the baseline without any correction of the delay."""

# mypy: disable-error-code="no-untyped-def,attr-defined,untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from noflush.methods.device import jit, moved_moments, power, tl
from noflush.methods.elementwise import finish, move_moments
from noflush.methods.method import Fused, Method, Place
from noflush.methods.optimizer import DelayAwareOptimizer


class Hyper(NamedTuple):
    """Hyper-parameters of one group, as the optimizer takes them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Coefficients(NamedTuple):
    """What `rule` multiplies with.

    Attributes:
        gradient: factor of every gradient (unscale times clip).
        decay: 1 - lr * weight_decay.
        average: 1 - beta1, the weight of the gradient in the first moment.
        beta2, one_minus_beta2: of the second moment.
        bias2: square root of 1 - beta2^t: torch's formula divides after the root.
        eps: added to the denominator.
        of_momentum: factor of first moment / denominator.
    """

    gradient: Any
    decay: Any
    average: Any
    beta2: Any
    one_minus_beta2: Any
    bias2: Any
    eps: Any
    of_momentum: Any


def hyper(group: Mapping[str, Any], place: Place) -> Hyper:
    """`Method.hyper`."""
    beta1, beta2 = group["betas"]
    return Hyper(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])


def coefficients(h: Hyper, step: float, product: float, gradient: float) -> Coefficients:
    """`Method.coefficients`."""
    return Coefficients(
        gradient=gradient,
        decay=1 - h.lr * h.weight_decay,
        average=1 - h.beta1,
        beta2=h.beta2,
        one_minus_beta2=1 - h.beta2,
        bias2=(1 - h.beta2**step) ** 0.5,
        eps=h.eps,
        of_momentum=-(h.lr / (1 - h.beta1**step)),
    )


def rule(
    gradient: Tensor,
    weights: Tensor,
    target: Tensor,
    state: tuple[Tensor, ...],
    c: Coefficients,
    master: bool,
    seed: Any = 0,
    first: int = 0,
) -> None:
    """`Method.rule`, in the order of torch's own; ``state`` is (exp_avg, exp_avg_sq)."""
    _, m, v = move_moments(gradient, weights, state, c)
    denominator = v.sqrt() / c.bias2 + c.eps
    new = weights if master else target
    new.copy_(weights * c.decay)
    new.addcdiv_(m * c.of_momentum, denominator)
    finish(new, target, ((state[0], m), (state[1], v)), master, seed, first)


@jit
def _fused_coefficients(h, step, product, out):
    lr, beta1, beta2 = tl.load(h), tl.load(h + 1), tl.load(h + 2)
    tl.store(out, (1.0 - lr * tl.load(h + 4)).to(tl.float32))
    tl.store(out + 1, (1.0 - beta1).to(tl.float32))
    tl.store(out + 2, beta2.to(tl.float32))
    tl.store(out + 3, (1.0 - beta2).to(tl.float32))
    tl.store(out + 4, (1.0 - power(beta2, step)).to(tl.float32))
    tl.store(out + 5, tl.load(h + 3).to(tl.float32))
    tl.store(out + 6, (-lr / (1.0 - power(beta1, step))).to(tl.float32))


@jit
def _fused_rule(g, w, m, v, c):
    first, second = moved_moments(g, m, v, tl.load(c + 1), tl.load(c + 2), tl.load(c + 3))
    denominator = tl.sqrt_rn(second * (1.0 / tl.load(c + 4))) + tl.load(c + 5)
    return w * tl.load(c) + tl.div_rn(first * tl.load(c + 6), denominator), first, second


class PipeDreamAdamW(DelayAwareOptimizer):
    """AdamW through the fused kernels: PipeDream's optimizer, the baseline without any correction of the delay.

    At equal settings it equals ``torch.optim.AdamW`` bit for bit in float32 on a CPU (Loshchilov and Hutter, ICLR
    2019; used with weight stashing as in Narayanan et al., SOSP 2019). Its row in `table` has defaults and ranges.

    Args:
        params: parameters or groups; dense, float32 (their masters, in mixed precision).
        lr: learning rate.
        betas: (beta1, beta2).
        eps: added to the denominator.
        weight_decay: decoupled.
        moments: ``"fp32"``, or ``"bf16"``, rounded stochastically.

    Raises:
        ValueError: a value outside its range.
        TypeError: a parameter that it does not have.
    """

    METHOD = Method("PipeDreamAdamW", hyper, coefficients, rule, fused=Fused(7, _fused_coefficients, _fused_rule))
