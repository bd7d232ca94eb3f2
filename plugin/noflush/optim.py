"""Update rules for weights whose gradients arrive late. Plain torch optimizers; no host.

Both write the next weights out of place when `step_into` is called, so that a stage with several live weight
versions needs no copy. A stage's delay, in updates, reaches them through `set_stage`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

Targets = Mapping[Tensor, Tensor]


class DelayAwareOptimizer(Optimizer):
    """What the two rules share: out-of-place steps and the stage they serve."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self.stage, self.stages, self.delay = 0, 1, 0.0
        super().__init__(params, defaults)

    def set_stage(self, stage: int, stages: int, delay: float) -> None:
        """Tells the rule where it works: stage s of P, and its mean delay in updates (0 without asynchrony)."""
        self.stage, self.stages, self.delay = stage, stages, delay

    def forget_weights(self) -> None:
        """Tells the rule that the weights are about to be replaced, by a checkpoint say."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_into({})
        return loss

    @torch.no_grad()
    def step_into(self, targets: Targets) -> None:
        """One update; the next value of parameter p goes to ``targets[p]`` (same shape and dtype), else into p.

        A parameter without a gradient is carried over unchanged.
        """
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in active):
                raise RuntimeError(f"{type(self).__name__} does not take sparse gradients; use dense embeddings")
            for p in group["params"]:
                if p.grad is None and p in targets:
                    targets[p].copy_(p)
            if active:
                self._update(group, active, [targets.get(p, p) for p in active])

    def _update(self, group: dict[str, Any], params: list[Tensor], out: list[Tensor]) -> None:
        raise AssertionError(f"{type(self).__name__} must define _update")

    def _momentum(self, group: dict[str, Any], base: float) -> float:
        """Eq 13: gamma_i = 0.9 + 0.09 (P - i) / P for 1-indexed stage i, in place of ``base`` if asked for."""
        if not group["stage_momentum"]:
            return base
        return 0.9 + 0.09 * (self.stages - 1 - self.stage) / self.stages

    def _learning_rate(self, group: dict[str, Any], step: float) -> float:
        """Eq 13: eta / max(1, delay)^rho, where rho falls from 1 to 0 over ``lr_discount_steps`` updates."""
        lr = float(group["lr"])
        horizon = group["lr_discount_steps"]
        if not horizon or self.delay <= 1:
            return lr
        rho = 1.0 - min((step - 1) / horizon, 1.0)
        return lr / float(self.delay**rho)


def _check(rules: Iterable[tuple[str, Any, bool, str]]) -> None:
    for name, value, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name} is {value!r}: it must be {rule}")


class DelayAwareNAdamW(DelayAwareOptimizer):
    r"""NAdam with decoupled weight decay, whose Nesterov look-ahead corrects the delay of the gradients.

    Ajanthan et al., "Nesterov method for asynchronous pipeline parallel optimization" (ICML 2025,
    arXiv 2505.01099), section on the practical optimizer: with :math:`\beta_1 = 0.99`, NAdam's own coefficients
    supply both of Eq 10's ingredients, the look-ahead :math:`\mu_{t+1}\hat m` and the discount
    :math:`(1-\mu_t) g`. At equal settings it equals ``torch.optim.NAdam(decoupled_weight_decay=True)``
    bit for bit in float32 on a CPU, and their state dicts are interchangeable.

    Args:
        params: parameters or groups, as any torch optimizer takes; dense, floating point.
        lr: learning rate, >= 0.
        betas: (beta1, beta2), each in [0, 1). The paper's beta1 is 0.99.
        eps: >= 0.
        weight_decay: decoupled: the weights shrink by ``lr * weight_decay`` an update; >= 0.
        momentum_decay: psi of ``mu_t = beta1 (1 - 0.96^(t psi) / 2)``; >= 0. Runs of a few thousand steps never
            leave the warm-up of mu with the default.
        momentum_schedule: ``"nadam"`` as above, or ``"constant"``: mu_t = beta1 from the first step on.
        stage_momentum: Eq 13's momentum by stage, 0.9 to 0.99, in place of beta1. Meant for weights ``latest``.
        lr_discount_steps: Eq 13's learning-rate discount ``lr / delay^rho`` with rho falling from 1 to 0 over so
            many updates; 0 for none. Meant for weights ``latest``.

    Raises:
        ValueError: a value outside its range.
    """

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
    ) -> None:
        _check(
            [
                ("lr", lr, lr >= 0, "0 or more"),
                ("betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)"),
                ("eps", eps, eps >= 0, "0 or more"),
                ("weight_decay", weight_decay, weight_decay >= 0, "0 or more"),
                ("momentum_decay", momentum_decay, momentum_decay >= 0, "0 or more"),
                (
                    "momentum_schedule",
                    momentum_schedule,
                    momentum_schedule in ("nadam", "constant"),
                    "nadam or constant",
                ),
                ("stage_momentum", stage_momentum, isinstance(stage_momentum, bool), "true or false"),
                ("lr_discount_steps", lr_discount_steps, lr_discount_steps >= 0, "0 or more"),
            ]
        )
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
            },
        )

    def _mu(self, group: dict[str, Any], beta1: float, step: float) -> float:
        if group["momentum_schedule"] == "constant":
            return beta1
        return float(beta1 * (1.0 - 0.5 * (0.96 ** (step * group["momentum_decay"]))))

    def _update(self, group: dict[str, Any], params: list[Tensor], out: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.tensor(0.0),
                    "mu_product": torch.ones((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }
        beta1 = self._momentum(group, group["betas"][0])
        beta2 = group["betas"][1]
        grads = [p.grad for p in params if p.grad is not None]
        state = [self.state[p] for p in params]
        exp_avg = [s["exp_avg"] for s in state]
        exp_avg_sq = [s["exp_avg_sq"] for s in state]

        torch._foreach_add_([s["step"] for s in state], 1.0)
        steps = [s["step"].item() for s in state]
        mus = [self._mu(group, beta1, step) for step in steps]
        for s, mu in zip(state, mus, strict=True):
            s["mu_product"] *= mu
        products = [s["mu_product"].item() for s in state]
        rates = [self._learning_rate(group, step) for step in steps]

        # The decay reads the current weights and writes the next ones: the pass that needs no copy.
        for p, target, lr in zip(params, out, rates, strict=True):
            torch.mul(p, 1 - lr * group["weight_decay"], out=target)
        torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        torch._foreach_addcmul_(exp_avg_sq, grads, grads, value=1 - beta2)
        denom = torch._foreach_div(exp_avg_sq, [1 - beta2**step for step in steps])
        torch._foreach_sqrt_(denom)
        torch._foreach_add_(denom, group["eps"])
        of_gradient, of_momentum = [], []
        for step, mu, product, lr in zip(steps, mus, products, rates, strict=True):
            mu_next = self._mu(group, beta1, step + 1)
            of_gradient.append(-lr * (1.0 - mu) / (1.0 - product))
            of_momentum.append((-lr * mu_next) / (1.0 - product * mu_next))
        torch._foreach_addcdiv_(out, grads, denom, of_gradient)
        torch._foreach_addcdiv_(out, exp_avg, denom, of_momentum)


class DelayAwareNAG(DelayAwareOptimizer):
    r"""Nesterov's method with the gradient discounted by :math:`1-\gamma`, for delayed gradients.

    Ajanthan et al. (arXiv 2505.01099), Eq 10::

        d_t     = gamma_t (w_t - w_{t-1})
        w_{t+1} = w_t + d_t - lr (1 - gamma_t) grad(w_{t-tau} + d_{t-tau})

    The parameters hold the look-ahead point ``w_t + d_t``, which is what a forward must use; ``w_t`` itself is
    state (key ``weight``, shape and dtype of the parameter). Weight decay is decoupled.

    Args:
        params: parameters or groups; dense, floating point.
        lr: learning rate, >= 0.
        momentum: gamma in [0, 1); 0.99 is the paper's regime.
        weight_decay: decoupled, >= 0.
        momentum_schedule: ``"constant"``, or ``"theorem"``: gamma_t = max(0, (t - 2) / t), as in Theorem 1.
        stage_momentum: Eq 13's momentum by stage in place of ``momentum``.
        lr_discount_steps: as in `DelayAwareNAdamW`.

    Raises:
        ValueError: a value outside its range.
    """

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
        _check(
            [
                ("lr", lr, lr >= 0, "0 or more"),
                ("momentum", momentum, 0 <= momentum < 1, "in [0, 1)"),
                ("weight_decay", weight_decay, weight_decay >= 0, "0 or more"),
                (
                    "momentum_schedule",
                    momentum_schedule,
                    momentum_schedule in ("constant", "theorem"),
                    "constant or theorem",
                ),
                ("stage_momentum", stage_momentum, isinstance(stage_momentum, bool), "true or false"),
                ("lr_discount_steps", lr_discount_steps, lr_discount_steps >= 0, "0 or more"),
            ]
        )
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
        self.state.clear()

    def _gamma(self, group: dict[str, Any], step: float) -> float:
        if group["momentum_schedule"] == "theorem":
            return max(0.0, (step - 2) / step)
        return self._momentum(group, group["momentum"])

    def _update(self, group: dict[str, Any], params: list[Tensor], out: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                # Before the first update there is no drift to look ahead along: d_1 = 0 and p is w_1.
                self.state[p] = {"step": torch.tensor(0.0), "weight": p.detach().clone()}
        state = [self.state[p] for p in params]
        torch._foreach_add_([s["step"] for s in state], 1.0)
        for p, target, s in zip(params, out, state, strict=True):
            step, weight = s["step"].item(), s["weight"]
            lr = self._learning_rate(group, step)
            torch.mul(p, 1 - lr * group["weight_decay"], out=target)
            assert p.grad is not None
            target.add_(p.grad, alpha=-lr * (1 - self._gamma(group, step)))
            drift = target - weight
            weight.copy_(target)
            target.add_(drift, alpha=self._gamma(group, step + 1))


RULES: dict[str, type[DelayAwareOptimizer]] = {
    "DelayAwareNAdamW": DelayAwareNAdamW,
    "DelayAwareNAG": DelayAwareNAG,
}
"""Name in the JSON's ``optimizer.type`` to class."""
