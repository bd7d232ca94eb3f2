"""`DelayAwareNAdamW`: NAdam whose Nesterov look-ahead corrects the delay of the gradients."""

# mypy: disable-error-code="no-untyped-def,attr-defined,untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from noflush.methods.device import LOG2_OF_096, discounted, jit, moved_moments, power, tl
from noflush.methods.elementwise import finish, move_moments
from noflush.methods.method import Fused, Method, Place
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.methods.scalars import learning_rate, stage_momentum


class Hyper(NamedTuple):
    """Hyper-parameters of one group at one stage.

    Attributes:
        lr, beta1, beta2, eps, weight_decay: as the optimizer takes them, Eq 13's momentum already in ``beta1``.
        momentum_decay: psi of ``mu_t = beta1 (1 - 0.96^(t psi) / 2)``.
        fixed_momentum: 1.0 for mu_t = beta1; else 0.0.
        discount_steps, delay: of Eq 13's learning-rate discount.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    momentum_decay: float
    fixed_momentum: float
    discount_steps: float
    delay: float


class Coefficients(NamedTuple):
    """What `rule` multiplies with.

    Attributes:
        gradient: factor of every gradient (unscale times clip).
        decay: 1 - lr * weight_decay.
        average: 1 - beta1, the weight of the gradient in the first moment.
        beta2, one_minus_beta2: of the second moment.
        bias2: 1 - beta2^t.
        eps: added to the denominator.
        of_gradient, of_momentum: factors of gradient and first moment / denominator.
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


def hyper(group: Mapping[str, Any], place: Place) -> Hyper:
    """`Method.hyper`."""
    beta1, beta2 = group["betas"]
    return Hyper(
        lr=float(group["lr"]),
        beta1=stage_momentum(group["stage_momentum"], beta1, place.stage, place.stages),
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        momentum_decay=group["momentum_decay"],
        fixed_momentum=float(group["momentum_schedule"] == "constant"),
        discount_steps=float(group["lr_discount_steps"]),
        delay=place.delay,
    )


def momentum(h: Hyper, step: float) -> float:
    """NAdam's mu_t, its warm-up included."""
    if h.fixed_momentum:
        return h.beta1
    return h.beta1 * (1.0 - 0.5 * float(0.96 ** (step * h.momentum_decay)))


def coefficients(h: Hyper, step: float, mu_product: float, gradient: float) -> Coefficients:
    """`Method.coefficients`; ``mu_product`` includes this step's mu."""
    lr = learning_rate(h.lr, h.discount_steps, h.delay, step)
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
    """`Method.rule`; ``state`` is (exp_avg, exp_avg_sq)."""
    g, m, v = move_moments(gradient, weights, state, c)
    denominator = (v / c.bias2).sqrt() + c.eps
    new = weights if master else target
    new.copy_(weights * c.decay)
    new.addcdiv_(g * c.of_gradient, denominator).addcdiv_(m * c.of_momentum, denominator)
    finish(new, target, ((state[0], m), (state[1], v)), master, seed, first)


@jit
def _fused_momentum(h, step):
    beta1, momentum_decay, fixed = tl.load(h + 1), tl.load(h + 5), tl.load(h + 6)
    return tl.where(fixed != 0, beta1, beta1 * (1.0 - 0.5 * tl.exp2(step * momentum_decay * LOG2_OF_096)))


@jit
def _fused_coefficients(h, step, product, out):
    beta1, beta2, eps, weight_decay = tl.load(h + 1), tl.load(h + 2), tl.load(h + 3), tl.load(h + 4)
    lr = discounted(tl.load(h), tl.load(h + 7), tl.load(h + 8), step)
    mu, mu_next = _fused_momentum(h, step), _fused_momentum(h, step + 1.0)
    tl.store(out, (1.0 - lr * weight_decay).to(tl.float32))
    tl.store(out + 1, (1.0 - beta1).to(tl.float32))
    tl.store(out + 2, beta2.to(tl.float32))
    tl.store(out + 3, (1.0 - beta2).to(tl.float32))
    tl.store(out + 4, (1.0 - power(beta2, step)).to(tl.float32))
    tl.store(out + 5, eps.to(tl.float32))
    tl.store(out + 6, (-lr * (1.0 - mu) / (1.0 - product)).to(tl.float32))
    tl.store(out + 7, (-lr * mu_next / (1.0 - product * mu_next)).to(tl.float32))


@jit
def _fused_rule(g, w, m, v, c):
    first, second = moved_moments(g, m, v, tl.load(c + 1), tl.load(c + 2), tl.load(c + 3))
    # One square root and one division an element: torch's two of each differ in the last place only.
    denominator = tl.sqrt_rn(second * (1.0 / tl.load(c + 4))) + tl.load(c + 5)
    move = first * tl.load(c + 7)
    move += g * tl.load(c + 6)
    return w * tl.load(c) + tl.div_rn(move, denominator), first, second


class DelayAwareNAdamW(DelayAwareOptimizer):
    r"""NAdam with decoupled weight decay, whose Nesterov look-ahead corrects the delay of the gradients.

    Ajanthan et al., "Nesterov method for asynchronous pipeline parallel optimization" (ICML 2025,
    arXiv 2505.01099), section on the practical optimizer: with :math:`\beta_1 = 0.99`, NAdam's own coefficients
    supply both of Eq 10's ingredients, the look-ahead :math:`\mu_{t+1}\hat m` and the discount
    :math:`(1-\mu_t) g`. At equal settings it equals ``torch.optim.NAdam(decoupled_weight_decay=True)``
    bit for bit in float32 on a CPU, and their state dicts are interchangeable.

    Its row in `table` has defaults and ranges.

    Args:
        params: parameters or groups, as any torch optimizer takes; dense, float32 (their masters, in mixed precision).
        lr: learning rate.
        betas: (beta1, beta2). The paper's beta1 is 0.99.
        eps: added to the denominator.
        weight_decay: decoupled: the weights shrink by ``lr * weight_decay`` an update.
        momentum_decay: psi of ``mu_t = beta1 (1 - 0.96^(t psi) / 2)``. Runs of a few thousand steps never leave the
            warm-up of mu with the default.
        momentum_schedule: ``"nadam"`` as above, or ``"constant"``: mu_t = beta1 from the first step on.
        stage_momentum: Eq 13's momentum by stage: beta1 (0.9 in the paper) at the last one, the nearer to 0.99 the more
            stages follow. Meant for weights ``latest``.
        lr_discount_steps: Eq 13's learning-rate discount ``lr / delay^rho`` with rho = 1 - t / C at update t (from 1)
            of these C; 0 for none. Meant for weights ``latest``.
        moments: ``"fp32"``, or ``"bf16"``: both moments in bfloat16, rounded stochastically; 4 bytes a parameter less.

    Raises:
        ValueError: a value outside its range.
        TypeError: a parameter that it does not have.
    """

    METHOD = Method(
        "DelayAwareNAdamW",
        hyper,
        coefficients,
        rule,
        factor=momentum,
        fused=Fused(8, _fused_coefficients, _fused_rule, _fused_momentum),
    )
