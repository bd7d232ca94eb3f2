"""`DelayAwareNAG`: Nesterov's method with discounted gradients, for delayed gradients."""

# mypy: disable-error-code="no-untyped-def,attr-defined,untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from noflush.methods.device import discounted, jit, tl
from noflush.methods.elementwise import finish
from noflush.methods.method import Fused, Method, Place
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.methods.scalars import learning_rate, stage_momentum


class Hyper(NamedTuple):
    """Hyper-parameters of one group at one stage.

    Attributes:
        lr, weight_decay: as the optimizer takes them.
        momentum: gamma, Eq 13's by stage already in it.
        fixed_momentum: 1.0 for a momentum that does not follow Theorem 1; else 0.0.
        discount_steps, delay: of Eq 13's learning-rate discount.
    """

    lr: float
    momentum: float
    weight_decay: float
    fixed_momentum: float
    discount_steps: float
    delay: float


class Coefficients(NamedTuple):
    """What `rule` multiplies with.

    Attributes:
        gradient: factor of every gradient (unscale times clip).
        decay: 1 - lr * weight_decay.
        of_gradient: factor of the gradient.
        of_momentum: the look-ahead's momentum.
    """

    gradient: Any
    decay: Any
    of_gradient: Any
    of_momentum: Any


def hyper(group: Mapping[str, Any], place: Place) -> Hyper:
    """`Method.hyper`."""
    return Hyper(
        lr=float(group["lr"]),
        momentum=stage_momentum(group["stage_momentum"], group["momentum"], place.stage, place.stages),
        weight_decay=group["weight_decay"],
        fixed_momentum=float(group["momentum_schedule"] == "constant"),
        discount_steps=float(group["lr_discount_steps"]),
        delay=place.delay,
    )


def momentum(h: Hyper, step: float) -> float:
    """gamma_t of Eq 10: constant, or Theorem 1's (t - 2) / t."""
    return h.momentum if h.fixed_momentum else max(0.0, (step - 2) / step)


def coefficients(h: Hyper, step: float, product: float, gradient: float) -> Coefficients:
    """`Method.coefficients`."""
    lr = learning_rate(h.lr, h.discount_steps, h.delay, step)
    return Coefficients(
        gradient=gradient,
        decay=1 - lr * h.weight_decay,
        of_gradient=-lr * (1 - momentum(h, step)),
        of_momentum=momentum(h, step + 1),
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
    """`Method.rule`, Eq 10 at the look-ahead point; ``state`` is (weight,), which is w_t itself."""
    (weight,) = state
    g = gradient.to(weights.dtype) * c.gradient
    new = weights if master else target
    new.copy_(weights * c.decay)
    new.add_(g * c.of_gradient)
    drift = new - weight
    weight.copy_(new)
    new.add_(drift * c.of_momentum)
    finish(new, target, (), master, seed, first)


def fresh(p: Tensor) -> tuple[Tensor, ...]:
    """Before the first update there is no drift to look ahead along: d_1 = 0 and ``p`` is w_1."""
    return (p.detach().clone(),)


@jit
def _fused_coefficients(h, step, product, out):
    gamma, fixed = tl.load(h + 1), tl.load(h + 3)
    lr = discounted(tl.load(h), tl.load(h + 4), tl.load(h + 5), step)
    now = tl.where(fixed != 0, gamma, tl.maximum((step - 2.0) / step, 0.0))
    ahead = tl.where(fixed != 0, gamma, tl.maximum((step - 1.0) / (step + 1.0), 0.0))
    tl.store(out, (1.0 - lr * tl.load(h + 2)).to(tl.float32))
    tl.store(out + 1, (-lr * (1.0 - now)).to(tl.float32))
    tl.store(out + 2, ahead.to(tl.float32))


@jit
def _fused_rule(g, w, weight, unused, c):
    at = w * tl.load(c) + g * tl.load(c + 1)
    return at + (at - weight) * tl.load(c + 2), at, unused


class DelayAwareNAG(DelayAwareOptimizer):
    r"""Nesterov's method with the gradient discounted by :math:`1-\gamma`, for delayed gradients.

    Ajanthan et al. (arXiv 2505.01099), Eq 10::

        d_t     = gamma_t (w_t - w_{t-1})
        w_{t+1} = w_t + d_t - lr (1 - gamma_t) grad(w_{t-tau} + d_{t-tau})

    The parameters hold the look-ahead point ``w_t + d_t``, which is what a forward must use; ``w_t`` itself is
    state (key ``weight``, shape and dtype of the parameter). Weight decay is decoupled. Its row in `table` has defaults
    and ranges.

    Args:
        params: parameters or groups; dense, float32 (their masters, in mixed precision).
        lr: learning rate.
        momentum: gamma; 0.99 is the paper's regime.
        weight_decay: decoupled.
        momentum_schedule: ``"constant"``, or ``"theorem"``: gamma_t = max(0, (t - 2) / t), as in Theorem 1.
        stage_momentum: Eq 13's momentum by stage, from ``momentum`` (0.9 in the paper) at the last one towards 0.99.
        lr_discount_steps: as in `DelayAwareNAdamW`.

    Raises:
        ValueError: a value outside its range.
        TypeError: a parameter that it does not have.
    """

    METHOD = Method(
        "DelayAwareNAG", hyper, coefficients, rule, fresh=fresh, fused=Fused(3, _fused_coefficients, _fused_rule)
    )
