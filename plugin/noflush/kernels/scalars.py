"""The numbers of one update, from hyper-parameters and the step. Pure: no torch.

The vector for the device (`Hyper.words`) and the order of its results (`Coefficients`) are what the Triton kernel
`fused.prepare` reads and writes; the functions here are what it is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, Literal, NamedTuple

RuleName = Literal["nadamw", "nag", "adamw"]


class Coefficients(NamedTuple):
    """What `reference` multiplies with; floats, or 0-dim float32 tensors where a compiled graph must not specialise.

    Attributes:
        gradient: factor of every gradient (unscale times clip).
        decay: 1 - lr * weight_decay.
        average: 1 - beta1, the weight of the gradient in the first moment.
        beta2, one_minus_beta2: of the second moment.
        bias2: 1 - beta2^t (its square root for adamw, whose torch formula divides after the root).
        eps: added to the denominator.
        of_gradient: factor of gradient / denominator (of the gradient itself for nag).
        of_momentum: factor of first moment / denominator (for nag: the look-ahead's momentum).
    """

    gradient: Any
    decay: Any
    average: Any
    beta2: Any
    one_minus_beta2: Any
    bias2: Any
    eps: Any
    of_gradient: Any
    of_momentum: Any


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of one flat group at one stage, with Eq 13's stage momentum already in ``beta1``.

    Attributes:
        lr, beta1, beta2, eps, weight_decay: as the optimizers take them (nag: beta1 is its momentum).
        momentum_decay: psi of NAdam's ``mu_t = beta1 (1 - 0.96^(t psi) / 2)``.
        fixed_momentum: 1.0 for mu_t = beta1 (nadamw), or a momentum that does not follow Theorem 1 (nag); else 0.0.
        discount_steps: Eq 13's learning-rate discount ``lr / delay^rho``, rho falling from 1 to 0; 0: none.
        delay: the stage's mean delay in updates.
    """

    lr: float
    beta1: float
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    momentum_decay: float = 0.0
    fixed_momentum: float = 1.0
    discount_steps: float = 0.0
    delay: float = 0.0

    def words(self) -> tuple[float, ...]:
        """The fields in order, as the device reads them (float64)."""
        return astuple(self)


def learning_rate(h: Hyper, step: float) -> float:
    """Eq 13 of arXiv 2505.01099: lr / max(1, delay)^rho at update ``step`` (from 1).

    rho = 1 - step / C, as in the authors' released code: the first update has rho below 1 already, number C has 0.
    """
    if not h.discount_steps or h.delay <= 1:
        return h.lr
    rho = 1.0 - min(step / h.discount_steps, 1.0)
    return h.lr / float(h.delay**rho)


def momentum(h: Hyper, step: float) -> float:
    """NAdam's mu_t, its warm-up included."""
    if h.fixed_momentum:
        return h.beta1
    return h.beta1 * (1.0 - 0.5 * float(0.96 ** (step * h.momentum_decay)))


def nesterov_momentum(h: Hyper, step: float) -> float:
    """gamma_t of Eq 10: constant, or Theorem 1's (t - 2) / t."""
    return h.beta1 if h.fixed_momentum else max(0.0, (step - 2) / step)


def nadamw(h: Hyper, step: float, mu_product: float, gradient: float) -> Coefficients:
    """Update ``step`` of `DelayAwareNAdamW`; ``mu_product`` includes this step's mu."""
    lr = learning_rate(h, step)
    mu, mu_next = momentum(h, step), momentum(h, step + 1)
    return Coefficients(
        gradient=gradient,
        decay=1 - lr * h.weight_decay,
        average=1 - h.beta1,
        beta2=h.beta2,
        one_minus_beta2=1 - h.beta2,
        bias2=1 - h.beta2**step,
        eps=h.eps,
        of_gradient=-lr * (1.0 - mu) / (1.0 - mu_product),
        of_momentum=(-lr * mu_next) / (1.0 - mu_product * mu_next),
    )


def adamw(h: Hyper, step: float, mu_product: float, gradient: float) -> Coefficients:
    """Update ``step`` of `PipeDreamAdamW`."""
    lr = learning_rate(h, step)
    return Coefficients(
        gradient=gradient,
        decay=1 - lr * h.weight_decay,
        average=1 - h.beta1,
        beta2=h.beta2,
        one_minus_beta2=1 - h.beta2,
        bias2=(1 - h.beta2**step) ** 0.5,
        eps=h.eps,
        of_gradient=0.0,
        of_momentum=-(lr / (1 - h.beta1**step)),
    )


def nag(h: Hyper, step: float, mu_product: float, gradient: float) -> Coefficients:
    """Update ``step`` of `DelayAwareNAG`."""
    lr = learning_rate(h, step)
    return Coefficients(
        gradient=gradient,
        decay=1 - lr * h.weight_decay,
        average=0.0,
        beta2=0.0,
        one_minus_beta2=0.0,
        bias2=0.0,
        eps=0.0,
        of_gradient=-lr * (1 - nesterov_momentum(h, step)),
        of_momentum=nesterov_momentum(h, step + 1),
    )


COEFFICIENTS: dict[RuleName, Callable[[Hyper, float, float, float], Coefficients]] = {
    "nadamw": nadamw,
    "adamw": adamw,
    "nag": nag,
}
