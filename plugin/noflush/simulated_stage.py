"""One stage of the delay simulator: its newest weights, the older versions still needed, and its update."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noflush.methods import look_ahead
from noflush.methods.matrices import mark_embeddings_and_heads
from noflush.methods.optimizer import DelayAwareOptimizer

StageState = tuple[list[Tensor], dict[str, Any], dict[str, Any] | None]
"""True weights, the optimizer's state and the schedule's."""


@dataclass(frozen=True)
class Precision:
    """Which dtype holds what; float32 throughout by default.

    Attributes:
        weights: of the model. Other than float32, optimizers update float32 masters.
        accumulate: of a batch's gradients; None: the weights'.
        wire: in which replicas' gradients are summed; None: that of accumulation.
    """

    weights: torch.dtype = torch.float32
    accumulate: torch.dtype | None = None
    wire: torch.dtype | None = None


FLOAT32 = Precision()


class SimulatedStage:
    """A stage's layers, its newest weights (the module's own parameters) and the older versions still needed."""

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        versions: int,
        precision: Precision,
        replicas: int,
        borrowed: Sequence[str],
    ) -> None:
        self.module = module
        mark_embeddings_and_heads(module.named_modules())
        self.params = {n: p for n, p in module.named_parameters() if p.requires_grad and n not in borrowed}
        if precision.weights != torch.float32:
            module.to(precision.weights)
        # The true weights; those of the module are what forwards use.
        self.masters = {
            name: nn.Parameter(p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True))
            for name, p in self.params.items()
        }
        for name, master in self.masters.items():
            vars(master).update(vars(self.params[name]))  # what is said of it as a matrix
        self.optimizer = make_optimizer(list(self.masters.values()))
        self.history: deque[dict[str, Tensor]] = deque(maxlen=versions)
        self.newest = 0
        self._accumulate = precision.accumulate
        self._wire = precision.wire
        self.gradients: list[dict[str, Tensor]] = [{} for _ in range(replicas)]
        self.remember()

    def remember(self) -> None:
        """The newest weights are a version from now on."""
        self.history.append({name: p.detach().clone() for name, p in self.params.items()})

    def weights(self, version: int) -> dict[str, Tensor]:
        """Fresh leaves with the values of ``version``."""
        return {name: t.clone().requires_grad_() for name, t in self.history[version - self.newest - 1].items()}

    def accumulate(self, replica: int, name: str, gradient: Tensor) -> None:
        """Adds a micro-batch's ``gradient`` to those of its replica."""
        sums = self.gradients[replica]
        gradient = gradient.to(self._accumulate or gradient.dtype)
        sums[name] = gradient if name not in sums else sums[name] + gradient

    def take_gradients(self, scale: float) -> bool:
        """Gives the masters the replicas' mean gradients, unscaled; whether they are all finite."""
        replicas = len(self.gradients)
        for name, master in self.masters.items():
            parts = [sums[name] for sums in self.gradients if name in sums]
            master.grad = None
            if parts:
                total = parts[0]
                for part in parts[1:]:
                    wire = self._wire or total.dtype
                    total = (total.to(wire) + part.to(wire)).to(total.dtype)
                master.grad = total.to(master.dtype) / (scale * replicas)
            elif isinstance(self.optimizer, DelayAwareOptimizer):
                # The engine keeps gradients of noflush's own rules flat: what no loss reaches is zero there.
                master.grad = torch.zeros_like(master)
        self.gradients = [{} for _ in self.gradients]
        return all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in self.masters.values())

    def _with_gradients(self) -> list[nn.Parameter]:
        # In the order of the optimizer's groups, in which a stage adds them up too.
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def norm(self) -> Tensor:
        """Of the masters' gradients: 0-dim float32."""
        return torch.nn.utils.get_total_norm([p.grad for p in self._with_gradients() if p.grad is not None])

    def clip(self, limit: float, norm: Tensor) -> None:
        """Shrinks the gradients as if ``norm`` were theirs."""
        torch.nn.utils.clip_grads_with_norm_(self._with_gradients(), limit, norm)

    @torch.no_grad()
    def step(self) -> None:
        """An update of the true weights; forwards get what it looks ahead to."""
        ahead: dict[int, float] = {}
        if isinstance(self.optimizer, DelayAwareOptimizer):
            delay = self.optimizer.place.delay
            for group in self.optimizer.param_groups:
                ahead.update({id(p): look_ahead.steps(group, delay) for p in group["params"]})
        before = {name: master.clone() for name, master in self.masters.items()}
        self.optimizer.step()
        for name, p in self.params.items():
            now, a = self.masters[name], ahead.get(id(self.masters[name]), 0.0)
            p.copy_(now + (now - before[name]) * a if a else now)

    def in_order(self) -> list[Tensor]:
        """The true weights in the order of the optimizer's groups."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def shift(self, start: int, change: Tensor) -> None:
        """Adds ``change`` to the true weights from number ``start`` of them on; what forwards use follows."""
        used = {id(master): self.params[name] for name, master in self.masters.items()}
        passed = 0
        for master in self.in_order():
            low, high = max(start, passed), min(start + change.numel(), passed + master.numel())
            if low < high:
                part, within = change[low - start : high - start], slice(low - passed, high - passed)
                ahead = isinstance(self.optimizer, DelayAwareOptimizer) and self.optimizer.looks_ahead
                master.view(-1)[within].add_(part)
                published = used[id(master)].data.view(-1)[within]
                if ahead:
                    published.add_(part)
                else:
                    published.copy_(master.view(-1)[within])
            passed += master.numel()

    @torch.no_grad()
    def put(self, updates: int, state: StageState) -> None:
        """Goes on from another's true weights and optimizer state, as after ``updates`` updates."""
        for master, value in zip(self.in_order(), state[0], strict=True):
            master.copy_(value)
        self.optimizer.load_state_dict(state[1])
        self.publish()
        self.newest = updates
        self.history.clear()
        self.remember()

    @torch.no_grad()
    def publish(self) -> None:
        """Forwards get the true weights."""
        for name, p in self.params.items():
            p.copy_(self.masters[name])
