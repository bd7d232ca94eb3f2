"""Updates as DeepSpeed has them made: by optimizers of its own that wrap another, and of layers that are tied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from noflush.methods.flat import Outcome
from noflush.patches.deepspeed.weights import Bf16Weights, ZeroWeights
from noflush.stage.update import NoLookAhead, StageUpdate
from noflush.stage.versions import WeightRing
from noflush.stage.waits import Waits
from noflush.stage.weights import Weights


class WrappedUpdate(NoLookAhead):
    """By `BF16_Optimizer` or `DeepSpeedZeroOptimizer` around any torch optimizer; they reduce, clip and skip.

    Args:
        weights: the stage's weights.
        engine: reduces gradients.
    """

    def __init__(self, weights: Weights, engine: Any) -> None:
        self._weights = weights
        self._engine = engine

    def add_gradient(self, param: Tensor, gradient: Tensor) -> None:
        """As `StageUpdate.add_gradient`: `config` has refused tied layers with these optimizers."""
        raise AssertionError(f"{type(self._weights).__name__} takes no gradient of another stage's")

    @property
    def gives_sums(self) -> bool:
        """As `StageUpdate` says: DeepSpeed's ZeRO-1 has them in buckets of its own."""
        return isinstance(self._weights, Bf16Weights)

    def sums(self) -> list[Tensor | None]:
        """As `StageUpdate.sums`."""
        assert isinstance(self._weights, Bf16Weights), "gives_sums is false"
        return self._weights.sums()

    @torch.no_grad()
    def set_sums(self, sums: Sequence[Tensor | None]) -> None:
        """As `StageUpdate.set_sums`."""
        assert isinstance(self._weights, Bf16Weights), "gives_sums is false"
        self._weights.set_sums(sums)

    @torch.no_grad()
    def run(self, ring: WeightRing, scale: Tensor | float, whole: float = 0.0) -> Outcome:
        """As `StageUpdate.run`; a run that would have it clip by ``whole`` is refused (`faults`)."""
        zero = isinstance(self._weights, ZeroWeights)
        if self._engine.is_data_parallel or zero:
            self._engine._exec_reduce_grads()
        optimizer = self._weights.optimizer
        if zero:
            optimizer.loss_scaler.cur_scale = float(scale)
        newest = ring.newest_flats
        following = ring.begin_update()
        self._weights.point_at(following)
        optimizer.step()
        if optimizer.overflow:
            for old, new in zip(newest, following, strict=True):
                new.copy_(old)
        ring.commit_update()
        optimizer.zero_grad()
        found = optimizer._global_grad_norm  # None where zero_optimization.compute_grad_norm is false
        value = math.nan if found is None else found
        norm = torch.as_tensor(value, dtype=torch.float32, device=ring.device).reshape(())
        return Outcome(norm, torch.full_like(norm, float(optimizer.overflow)))


class TiedFirst:
    """An update before which the gradients of tied layers are added up over the stages that share them."""

    def __init__(self, update: StageUpdate, engine: Any, waits: Waits) -> None:
        self._update = update
        self._engine = engine
        self._waits = waits

    def run(self, ring: WeightRing, scale: Tensor | float, whole: float = 0.0) -> Outcome:
        """As `StageUpdate.run`."""
        with self._waits.counted():  # for the first stage's backward
            self._engine._exec_reduce_tied_grads()
        return self._update.run(ring, scale, whole)

    def add_gradient(self, param: Tensor, gradient: Tensor) -> None:
        """As `StageUpdate`; without a flush alone, where this is not."""
        raise AssertionError("tied layers without a flush are kept by their owner")

    def true_weights(self, ring: WeightRing) -> list[Tensor] | None:
        """As `StageUpdate`."""
        return self._update.true_weights(ring)

    def land(self, ring: WeightRing) -> None:
        """As `StageUpdate`."""
        self._update.land(ring)

    def take_off(self, ring: WeightRing, published: Sequence[Tensor]) -> None:
        """As `StageUpdate`."""
        self._update.take_off(ring, published)

    @property
    def looks_ahead(self) -> bool:
        """As `StageUpdate`."""
        return self._update.looks_ahead

    @property
    def gives_sums(self) -> bool:
        """As `StageUpdate`."""
        return self._update.gives_sums

    def sums(self) -> list[Tensor | None]:
        """As `StageUpdate`."""
        return self._update.sums()

    def set_sums(self, sums: Sequence[Tensor | None]) -> None:
        """As `StageUpdate`."""
        self._update.set_sums(sums)
