"""What noflush's update rules share: steps over flat tensors, and the stage they serve. A torch optimizer; no host.

A rule keeps hyper-parameters and state; the arithmetic is in `kernels`. `step` updates parameter by parameter, as
any torch optimizer. `flatten` tells the rule that its parameters lie one after the other in flat tensors; from then
on `step_flat` updates each of those in one pass, out of place if need be. A stage's delay, in updates, reaches the
rules through `set_stage`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from noflush.kernels.flat import Flat, Kernel, Outcome
from noflush.kernels.reference import RULES as ARITHMETIC
from noflush.kernels.scalars import COEFFICIENTS, Hyper, RuleName, momentum


@dataclass(frozen=True)
class FlatGroup:
    """Where some parameters of one group lie in a flat tensor of ``numel`` elements.

    Attributes:
        group: number of the optimizer's parameter group (its dict is replaced when a checkpoint is loaded).
        params: as the optimizer knows them.
        offsets: of each parameter's first element.
        numel: length of the flat tensor, gaps and padding included.
    """

    group: int
    params: tuple[Tensor, ...]
    offsets: tuple[int, ...]
    numel: int


@dataclass
class _FlatState:
    """A flat group's state, of which every parameter's entry in ``Optimizer.state`` is a view."""

    where: FlatGroup
    tensors: tuple[Tensor, ...]
    clock: Tensor


STAGE_MOMENTUM = 0.99
"""What Eq 13's momentum rises towards, the more stages follow."""


_MOMENTS = {"exp_avg", "exp_avg_sq"}
"""State that is zero before the first update."""


@cache
def mu_product(hyper: Hyper, steps: int) -> Tensor:
    """NAdam's mu_1 mu_2 ... of so many updates, multiplied one by one as these do: 0-dim float32."""
    product = torch.ones(())
    for step in range(1, steps + 1):
        product *= momentum(hyper, float(step))
        if not product:  # it underflows within some thousand
            break
    return product


class DelayAwareOptimizer(Optimizer):
    """What the rules share: flat steps, the stage they serve, and Eq 13's two discounts."""

    RULE: ClassVar[RuleName]
    STATE: ClassVar[tuple[str, ...]]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self.stage, self.stages, self.delay = 0, 1, 0.0
        self._flat: list[_FlatState] = []
        self._clocks: Tensor | None = None
        super().__init__(params, defaults)

    def set_stage(self, stage: int, stages: int, delay: float) -> None:
        """Tells the rule where it works: stage s of P, and its mean delay in updates (0 without asynchrony)."""
        self.stage, self.stages, self.delay = stage, stages, delay

    def forget_weights(self) -> None:
        """Tells the rule that the weights are about to be replaced, by a checkpoint say."""
        for flat in self._flat:
            # Hosts copy into it what a checkpoint has, and leave it as it is where that has none.
            flat.clock[1] = 1.0

    # ---- parameter by parameter --------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update in place of every parameter that has a gradient. Raises RuntimeError after `flatten`."""
        if self._flat:
            raise RuntimeError(f"{type(self).__name__} keeps flat state now: its parameters are updated by step_flat")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            hyper = self._hyper(group)
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, hyper, self._dtype(group))
        return loss

    def _step_one(self, p: Tensor, hyper: Hyper, dtype: torch.dtype | None) -> None:
        assert p.grad is not None
        self._check_parameter(p)
        state = self.state[p]
        if not state:
            state["step"], state["mu_product"] = torch.tensor(0.0), torch.ones(())
            state.update(zip(self.STATE, self._new_state(p, dtype), strict=True))
        state["step"] += 1
        step = state["step"].item()
        before = state["mu_product"] if "mu_product" in state else mu_product(hyper, int(step) - 1)
        state["mu_product"] = before * momentum(hyper, step)
        c = COEFFICIENTS[self.RULE](hyper, step, state["mu_product"].item(), 1.0)
        tensors = tuple(state[name] for name in self.STATE)
        ARITHMETIC[self.RULE](p.grad, p, p, tensors, c, False, False, int(step))

    def _check_parameter(self, p: Tensor) -> None:
        name = type(self).__name__
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError(f"{name} does not take sparse gradients; use dense embeddings")
        if p.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(
                f"{name} got a parameter of {p.dtype}: it updates float32 weights. Enable bf16 or fp16 in the "
                "DeepSpeed config, which keeps float32 master weights, in place of converting the module"
            )

    # ---- flat ---------------------------------------------------------------------------------------------

    def flatten(self, groups: Sequence[FlatGroup], kernel: Kernel) -> None:
        """Keeps state in flat tensors laid out as ``groups`` say; state there is already is carried over.

        The parameters' dtype is float32; gradients and targets of other dtypes are `step_flat`'s business.
        """
        for p in (p for where in groups for p in where.params):
            self._check_parameter(p)
            if p.dtype != torch.float32:
                raise RuntimeError(f"{type(self).__name__} got a parameter of {p.dtype}: under noflush it is float32")
        device = groups[0].params[0].device if groups else torch.device("cpu")
        self._clocks = torch.zeros((len(groups), 2), device=kernel.clock_device(device))
        self._clocks[:, 1] = 1.0
        self._flat = []
        for where, clock in zip(groups, self._clocks, strict=True):
            dtype = self._dtype(self.param_groups[where.group])
            empty = where.params[0].detach().new_zeros(where.numel)
            tensors = tuple(t.zero_() for t in self._new_state(empty, dtype))
            self._flat.append(_FlatState(where, tensors, clock))
        self.adopt_state()

    def adopt_state(self) -> None:
        """Moves what `state` holds into the flat tensors, and makes `state` views of them.

        For after `state` or the parameters were replaced: without any, it starts from the parameters as they are. The
        product of NAdam's mu, which no other optimizer has and tools that rewrite checkpoints drop, is worked out.

        Raises ValueError if some of a parameter's state is there and the rest is not.
        """
        for flat in self._flat:
            hyper = self._hyper(self.param_groups[flat.where.group])
            for p, offset in zip(flat.where.params, flat.where.offsets, strict=True):
                views = [t[offset : offset + p.numel()].view(p.shape) for t in flat.tensors]
                state = self.state[p]
                self._check_whole(state)
                for view, name, fresh in zip(views, self.STATE, self._new_state(p, None), strict=True):
                    view.copy_(state.get(name, fresh))
                flat.clock[0] = state.get("step", 0.0)
                flat.clock[1] = state.get("mu_product", 1.0)
                if flat.clock[0] and flat.clock[1] == 1.0:  # every mu is below one
                    flat.clock[1] = mu_product(hyper, int(flat.clock[0]))
                self.state[p] = {"step": flat.clock[0], "mu_product": flat.clock[1]}
                self.state[p].update(zip(self.STATE, views, strict=True))

    def _check_whole(self, state: Mapping[str, Any]) -> None:
        missing = sorted({"step", *self.STATE} - state.keys())
        if "step" in state and not state["step"] and any(state[k].any() for k in _MOMENTS & state.keys()):
            missing.append("a step above 0")
        if state and missing:
            raise ValueError(
                f"the optimizer's state has {', '.join(sorted(state))} and lacks {', '.join(missing)}, which "
                f"{type(self).__name__} cannot go on without: it is another optimizer's, or a tool that rewrote the "
                "checkpoint has dropped it. Load the checkpoint that was saved, or its weights alone "
                "(load_module_only=True)"
            )

    @torch.no_grad()
    def step_flat(
        self,
        kernel: Kernel,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        targets: Sequence[Tensor],
        master: bool,
        norm: Tensor,
        max_norm: float = 0.0,
        scale: Tensor | float = 1.0,
    ) -> Outcome:
        """One update of every flat group, in the order of `flatten`; clears the gradients.

        Args:
            kernel: that `flatten` was told of.
            gradients: flat, of any floating dtype, scaled by ``scale``.
            weights: flat float32.
            targets: flat; the next weight version.
            master: whether the weights are kept apart from the model's, and so updated in place; else only read.
            norm: of all gradients, all shards', still scaled: 0-dim float32.
            max_norm: clips the unscaled norm to so much; 0 clips nothing.
            scale: the loss scale.

        A norm that is not finite skips the update: state and weights stay, and the targets get the same weights.
        """
        flats = [
            Flat(g, w, t, state.tensors, state.clock, self._hyper(self.param_groups[state.where.group]), master)
            for g, w, t, state in zip(gradients, weights, targets, self._flat, strict=True)
        ]
        return kernel.update(self.RULE, flats, norm, max_norm, scale)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the groups of torch's own NAdam or AdamW too: what they do not name keeps this rule's default.

        Raises ValueError if they ask for what this rule does not do.
        """
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError(f"{type(self).__name__} takes no state of an optimizer with amsgrad or maximize")
            if group.get("weight_decay") and group.get("decoupled_weight_decay") is False:
                raise ValueError(
                    f"the state is of an optimizer whose weight_decay {group['weight_decay']} goes into the gradient; "
                    f"{type(self).__name__} shrinks the weights themselves: set weight_decay to 0 in it, or start anew"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; flat state takes the loaded values over."""
        super().load_state_dict(state_dict)
        self.adopt_state()

    # ---- what a rule defines ------------------------------------------------------------------------------

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        raise AssertionError(f"{type(self).__name__} must define _hyper")

    def _new_state(self, p: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        """State of a parameter before its first update; moments of ``dtype``."""
        kind = dtype or p.dtype
        return tuple(torch.zeros_like(p, dtype=kind, memory_format=torch.preserve_format) for _ in self.STATE)

    def _dtype(self, group: dict[str, Any]) -> torch.dtype | None:
        return torch.bfloat16 if group.get("moments") == "bf16" else None

    def _stage_momentum(self, group: dict[str, Any], base: float) -> float:
        """Eq 13: gamma_i = base + (P - i) / P (0.99 - base) for 1-indexed stage i (base 0.9 there), if asked for."""
        if not group["stage_momentum"]:
            return base
        return base + (self.stages - 1 - self.stage) / self.stages * (STAGE_MOMENTUM - base)
