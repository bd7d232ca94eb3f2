"""Update rules for weights whose gradients arrive late: hyper-parameters and what their state is. No host."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from noflush.flat_optimizer import STAGE_MOMENTUM, DelayAwareOptimizer
from noflush.kernels.scalars import Hyper


def _check(rules: Iterable[tuple[str, Any, bool, str]]) -> None:
    for name, value, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name} is {value!r}: it must be {rule}")


def _within(value: Any, least: float = 0.0, below: float = math.inf) -> bool:
    """Whether ``value`` is a number in [least, below); nan, infinities and text that looks like one are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < below


_NOT_NEGATIVE = "a finite number, 0 or more"


def _check_adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, moments: str) -> None:
    pair = isinstance(betas, (list, tuple)) and len(betas) == 2
    _check(
        [
            ("lr", lr, _within(lr), _NOT_NEGATIVE),
            ("betas", betas, pair and all(_within(b, below=1) for b in betas), "two numbers in [0, 1)"),
            ("eps", eps, _within(eps), _NOT_NEGATIVE),
            ("weight_decay", weight_decay, _within(weight_decay), _NOT_NEGATIVE),
            ("moments", moments, moments in ("fp32", "bf16"), "fp32 or bf16"),
        ]
    )


def _check_discounts(name: str, momentum: float, stage_momentum: bool, lr_discount_steps: int) -> None:
    rises = isinstance(stage_momentum, bool) and not (stage_momentum and momentum >= STAGE_MOMENTUM)
    whole = isinstance(lr_discount_steps, int) and _within(lr_discount_steps)
    _check(
        [
            ("stage_momentum", stage_momentum, isinstance(stage_momentum, bool), "true or false"),
            (
                "stage_momentum",
                stage_momentum,
                rises,
                f"left out, or {name} below {STAGE_MOMENTUM} (the paper's is 0.9): it raises {name}, which is "
                f"{momentum!r}, towards {STAGE_MOMENTUM}",
            ),
            ("lr_discount_steps", lr_discount_steps, whole, "a whole number, 0 or more"),
        ]
    )


class DelayAwareNAdamW(DelayAwareOptimizer):
    r"""NAdam with decoupled weight decay, whose Nesterov look-ahead corrects the delay of the gradients.

    Ajanthan et al., "Nesterov method for asynchronous pipeline parallel optimization" (ICML 2025,
    arXiv 2505.01099), section on the practical optimizer: with :math:`\beta_1 = 0.99`, NAdam's own coefficients
    supply both of Eq 10's ingredients, the look-ahead :math:`\mu_{t+1}\hat m` and the discount
    :math:`(1-\mu_t) g`. At equal settings it equals ``torch.optim.NAdam(decoupled_weight_decay=True)``
    bit for bit in float32 on a CPU, and their state dicts are interchangeable.

    Args:
        params: parameters or groups, as any torch optimizer takes; dense, float32 (their masters, in mixed precision).
        lr: learning rate, >= 0.
        betas: (beta1, beta2), each in [0, 1). The paper's beta1 is 0.99.
        eps: >= 0.
        weight_decay: decoupled: the weights shrink by ``lr * weight_decay`` an update; >= 0.
        momentum_decay: psi of ``mu_t = beta1 (1 - 0.96^(t psi) / 2)``; >= 0. Runs of a few thousand steps never
            leave the warm-up of mu with the default.
        momentum_schedule: ``"nadam"`` as above, or ``"constant"``: mu_t = beta1 from the first step on.
        stage_momentum: Eq 13's momentum by stage: beta1 (0.9 in the paper) at the last one, the nearer to 0.99 the more
            stages follow. Meant for weights ``latest``.
        lr_discount_steps: Eq 13's learning-rate discount ``lr / delay^rho`` with rho = 1 - t / C at update t (from 1)
            of these C; 0 for none. Meant for weights ``latest``.
        moments: ``"fp32"``, or ``"bf16"``: both moments in bfloat16, rounded stochastically; 4 bytes a parameter less.

    Raises:
        ValueError: a value outside its range.
    """

    RULE = "nadamw"
    STATE = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.99, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        momentum_schedule: Literal["nadam", "constant"] = "nadam",
        stage_momentum: bool = False,
        lr_discount_steps: int = 0,
        moments: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        _check_adam(lr, betas, eps, weight_decay, moments)
        schedules = ("nadam", "constant")
        _check(
            [
                ("momentum_decay", momentum_decay, _within(momentum_decay), _NOT_NEGATIVE),
                ("momentum_schedule", momentum_schedule, momentum_schedule in schedules, "nadam or constant"),
            ]
        )
        _check_discounts("betas[0]", betas[0], stage_momentum, lr_discount_steps)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum_decay": momentum_decay,
                "momentum_schedule": momentum_schedule,
                "stage_momentum": stage_momentum,
                "lr_discount_steps": lr_discount_steps,
                "moments": moments,
                "decoupled_weight_decay": True,  # for torch.optim.NAdam, should it load this state
            },
        )

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        return Hyper(
            lr=float(group["lr"]),
            beta1=self._stage_momentum(group, group["betas"][0]),
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            momentum_decay=group["momentum_decay"],
            fixed_momentum=float(group["momentum_schedule"] == "constant"),
            discount_steps=float(group["lr_discount_steps"]),
            delay=self.delay,
        )


class PipeDreamAdamW(DelayAwareOptimizer):
    """AdamW through the fused kernels: PipeDream's optimizer, the baseline without any correction of the delay.

    At equal settings it equals ``torch.optim.AdamW`` bit for bit in float32 on a CPU (Loshchilov and Hutter, ICLR
    2019; used with weight stashing as in Narayanan et al., SOSP 2019).

    Args:
        params: parameters or groups; dense, float32 (their masters, in mixed precision).
        lr: learning rate, >= 0.
        betas: (beta1, beta2), each in [0, 1).
        eps: >= 0.
        weight_decay: decoupled, >= 0.
        moments: ``"fp32"``, or ``"bf16"``, rounded stochastically.

    Raises:
        ValueError: a value outside its range.
    """

    RULE = "adamw"
    STATE = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        moments: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        _check_adam(lr, betas, eps, weight_decay, moments)
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "moments": moments}
        super().__init__(params, defaults)

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        beta1, beta2 = group["betas"]
        return Hyper(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])


class DelayAwareNAG(DelayAwareOptimizer):
    r"""Nesterov's method with the gradient discounted by :math:`1-\gamma`, for delayed gradients.

    Ajanthan et al. (arXiv 2505.01099), Eq 10::

        d_t     = gamma_t (w_t - w_{t-1})
        w_{t+1} = w_t + d_t - lr (1 - gamma_t) grad(w_{t-tau} + d_{t-tau})

    The parameters hold the look-ahead point ``w_t + d_t``, which is what a forward must use; ``w_t`` itself is
    state (key ``weight``, shape and dtype of the parameter). Weight decay is decoupled.

    Args:
        params: parameters or groups; dense, float32 (their masters, in mixed precision).
        lr: learning rate, >= 0.
        momentum: gamma in [0, 1); 0.99 is the paper's regime.
        weight_decay: decoupled, >= 0.
        momentum_schedule: ``"constant"``, or ``"theorem"``: gamma_t = max(0, (t - 2) / t), as in Theorem 1.
        stage_momentum: Eq 13's momentum by stage, from ``momentum`` (0.9 in the paper) at the last one towards 0.99.
        lr_discount_steps: as in `DelayAwareNAdamW`.

    Raises:
        ValueError: a value outside its range.
    """

    RULE = "nag"
    STATE = ("weight",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.99,
        weight_decay: float = 0.0,
        momentum_schedule: Literal["constant", "theorem"] = "constant",
        stage_momentum: bool = False,
        lr_discount_steps: int = 0,
    ) -> None:
        schedules = ("constant", "theorem")
        _check(
            [
                ("lr", lr, _within(lr), _NOT_NEGATIVE),
                ("momentum", momentum, _within(momentum, below=1), "in [0, 1)"),
                ("weight_decay", weight_decay, _within(weight_decay), _NOT_NEGATIVE),
                ("momentum_schedule", momentum_schedule, momentum_schedule in schedules, "constant or theorem"),
            ]
        )
        _check_discounts("momentum", momentum, stage_momentum, lr_discount_steps)
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "momentum_schedule": momentum_schedule,
                "stage_momentum": stage_momentum,
                "lr_discount_steps": lr_discount_steps,
            },
        )

    def forget_weights(self) -> None:
        """The drift from the old weights to the new ones is no momentum: starts from the new ones."""
        super().forget_weights()
        self.state.clear()

    def _new_state(self, p: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        # Before the first update there is no drift to look ahead along: d_1 = 0 and p is w_1.
        return (p.detach().clone(),)

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        return Hyper(
            lr=float(group["lr"]),
            beta1=self._stage_momentum(group, group["momentum"]),
            weight_decay=group["weight_decay"],
            fixed_momentum=float(group["momentum_schedule"] == "constant"),
            discount_steps=float(group["lr_discount_steps"]),
            delay=self.delay,
        )


RULES: dict[str, type[DelayAwareOptimizer]] = {
    "DelayAwareNAdamW": DelayAwareNAdamW,
    "DelayAwareNAG": DelayAwareNAG,
    "PipeDreamAdamW": PipeDreamAdamW,
}
"""Name in the JSON's ``optimizer.type`` to class."""
