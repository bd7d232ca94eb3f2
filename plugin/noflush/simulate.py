"""The delay simulator: P pipeline stages on one device, each gradient taken at the weights its schedule names.

It is the oracle the engine is tested against, so it shares nothing with the engine but the schedule's formulas:
no swapping, no messages, no micro-batches in flight. A micro-batch goes forward through all stages, each at its
own old version, and straight back; every stage then updates its newest weights. That is all that asynchrony
does to the numbers. It is also a tool: the price of staleness at any P, before any hardware is rented.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from noflush.optim import DelayAwareOptimizer
from noflush.schedule import Schedule

Payload = Tensor | tuple[Tensor, ...]


def _as_tuple(payload: Payload) -> tuple[Tensor, ...]:
    return payload if isinstance(payload, tuple) else (payload,)


class _Stage:
    """A stage's layers, its newest weights (the module's own parameters) and the older versions still needed."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, versions: int) -> None:
        self.module = module
        self.optimizer = optimizer
        self.params = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.history: deque[dict[str, Tensor]] = deque(maxlen=versions)
        self.newest = 0
        self.remember()

    def remember(self) -> None:
        self.history.append({name: p.detach().clone() for name, p in self.params.items()})

    def weights(self, version: int) -> dict[str, Tensor]:
        """Fresh leaves with the values of ``version``."""
        return {name: t.clone().requires_grad_() for name, t in self.history[version - self.newest - 1].items()}


class DelaySimulator:
    """Trains P virtual stages with the delays of a schedule.

    Args:
        stages: a module for each stage, applied one after the other to a tensor or a tuple of tensors.
        loss_fn: ``loss_fn(outputs, labels)`` -> 0-dim loss.
        make_optimizer: builds a stage's optimizer from its trainable parameters.
        schedule: of ``len(stages)`` stages.
        clip: largest norm of a stage's gradients; 0 clips nothing.
        make_lr_scheduler: builds a stage's learning-rate scheduler (stepped after each of its updates), or None.

    Raises:
        ValueError: the schedule has another number of stages.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        loss_fn: Callable[[Any, Any], Tensor],
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        schedule: Schedule,
        clip: float = 0.0,
        make_lr_scheduler: Callable[[Optimizer], Any] | None = None,
    ) -> None:
        if len(stages) != schedule.stages:
            raise ValueError(f"{len(stages)} stage modules for a schedule of {schedule.stages} stages")
        self.schedule = schedule
        self.micro_batches = 0
        self._loss_fn = loss_fn
        self._clip = clip
        self._segment = 0
        self._stages: list[_Stage] = []
        for s, module in enumerate(stages):
            optimizer = make_optimizer([p for p in module.parameters() if p.requires_grad])
            if isinstance(optimizer, DelayAwareOptimizer):
                optimizer.set_stage(s, schedule.stages, schedule.mean_delay(s))
            # For `latest` a forward is as old as with `stash`; only its backward differs.
            versions = schedule.max_delay(s) + 1
            self._stages.append(_Stage(module, optimizer, versions))
        self._lr = [make_lr_scheduler(s.optimizer) for s in self._stages] if make_lr_scheduler else []

    def train_micro_batch(self, inputs: Payload, labels: Any) -> Tensor:
        """One micro-batch forth and back; updates every stage after each K-th. Returns its loss, detached."""
        m = self.micro_batches - self._segment
        graphs = []
        payload = inputs
        for s, stage in enumerate(self._stages):
            # A version counted from the segment's start, as an offset from the newest.
            version = stage.newest - m // self.schedule.gas + self.schedule.version(s, m)
            weights = stage.weights(version)
            frozen = _as_tuple(payload)
            received = tuple(t.detach().requires_grad_(t.requires_grad) for t in frozen)
            outputs = functional_call(stage.module, weights, (received if isinstance(payload, tuple) else received[0],))
            graphs.append((weights, received, outputs))
            payload = outputs
        loss = self._loss_fn(payload, labels)
        grads: tuple[Tensor, ...] | None = None
        for stage, (weights, received, outputs) in zip(reversed(self._stages), reversed(graphs), strict=True):
            if self.schedule.weights == "latest" and not self.schedule.flushes:
                for name, leaf in weights.items():
                    leaf.data.copy_(stage.params[name])
            heads = [loss / self.schedule.gas] if grads is None else [t for t in _as_tuple(outputs) if t.requires_grad]
            wanted = [*weights.values(), *(t for t in received if t.requires_grad)]
            found = torch.autograd.grad(heads, wanted, grads, allow_unused=True)
            for (name, leaf), grad in zip(weights.items(), found, strict=False):
                if grad is not None:
                    param = stage.params[name]
                    param.grad = grad if param.grad is None else param.grad + grad
                del leaf
            grads = tuple(
                torch.zeros_like(t) if g is None else g
                for t, g in zip(wanted[len(weights) :], found[len(weights) :], strict=True)
            )
        self.micro_batches += 1
        if (m + 1) % self.schedule.gas == 0:
            self._update()
        return loss.detach()

    def _update(self) -> None:
        for s, stage in enumerate(self._stages):
            if self._clip > 0:
                torch.nn.utils.clip_grad_norm_(list(stage.params.values()), self._clip)
            stage.optimizer.step()
            stage.optimizer.zero_grad(set_to_none=True)
            stage.newest += 1
            stage.remember()
            if self._lr:
                self._lr[s].step()

    def drain(self) -> None:
        """What a drain does to the numbers: the next micro-batch sees every stage's newest weights."""
        self._segment = self.micro_batches

    def parameters(self, stage: int) -> dict[str, Tensor]:
        """The newest weights of ``stage`` by name within its module."""
        return {name: p.detach() for name, p in self._stages[stage].params.items()}

    @torch.no_grad()
    def evaluate(self, inputs: Payload, labels: Any) -> Tensor:
        """Loss of a micro-batch with every stage's newest weights, in evaluation mode."""
        payload = inputs
        for stage in self._stages:
            stage.module.eval()
            payload = stage.module(payload)
            stage.module.train()
        return self._loss_fn(payload, labels)
