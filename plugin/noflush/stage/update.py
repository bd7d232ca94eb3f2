"""One optimizer update of a stage, from its gradients to its next weight version.

`FusedUpdate`: a method of noflush's, whose kernel reads flat gradients and masters and writes the next version into its
slot in the same pass. `TorchUpdate`: any other torch optimizer, in float32. Both skip an update whose gradient norm is
not finite; the version number still moves on, with the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from noflush.kernels.norm import gradient_norm
from noflush.methods.flat import Kernel, Outcome
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.stage.slices import Slices, counted_regions
from noflush.stage.versions import WeightRing
from noflush.stage.weights import Weights, gather_weights, reduce_gradients


class StageUpdate(Protocol):
    """What a stage calls after every K-th backward.

    Attributes:
        looks_ahead: whether the newest version is not the true weights.
        gives_sums: whether a batch's gradients can be taken out before they are all there.
    """

    @property
    def looks_ahead(self) -> bool: ...

    @property
    def gives_sums(self) -> bool: ...

    def run(self, ring: WeightRing, scale: Tensor | float, whole: float = 0.0) -> Outcome:
        """Makes ``ring``'s next version out of the gradients, which carry the loss scale ``scale``; clears them.

        ``whole``: what is known of all stages' norm, by which it clips if that is above its own; 0: nothing.
        """

    def add_gradient(self, param: Tensor, gradient: Tensor) -> None:
        """Adds what other stages found for a weight of this one's, before `run`."""

    def true_weights(self, ring: WeightRing) -> list[Tensor] | None:
        """The true weights, flat as ``ring``'s versions are; None: they are the newest version (no look-ahead)."""

    def land(self, ring: WeightRing) -> None:
        """Makes the newest version the true weights, on a drained stage."""

    def take_off(self, ring: WeightRing, published: Sequence[Tensor]) -> None:
        """The inverse of `land`: what the newest version holds are the true weights, and it is to be ``published``."""

    def sums(self) -> list[Tensor | None]:
        """Gradients of the batch under way, this replica's, parameter by parameter; None: there is none yet."""

    def set_sums(self, sums: Sequence[Tensor | None]) -> None:
        """Puts `sums` back. Only where ``gives_sums``."""


class NoLookAhead:
    """What updates have in common whose newest version is the true weights."""

    looks_ahead = False

    def true_weights(self, ring: WeightRing) -> list[Tensor] | None:
        """As `StageUpdate.true_weights`."""
        return None

    def land(self, ring: WeightRing) -> None:
        """As `StageUpdate.land`."""

    def take_off(self, ring: WeightRing, published: Sequence[Tensor]) -> None:
        """As `StageUpdate.take_off`: nothing else was published."""


class FusedUpdate:
    """By a rule of noflush's and one of its kernels.

    Args:
        weights: the stage's weights.
        kernel: computes norm and update.
        max_norm: the stage's gradients are clipped to so much; 0 clips nothing.
        wire: dtype of the gradient reduction between replicas.
        predivide: what gradients are divided by before that reduction; the rest of the mean is taken after it.

    Attributes:
        over_groups: makes flat gradients, before an update, the mean over other groups' too.
    """

    gives_sums = True

    def __init__(self, weights: Weights, kernel: Kernel, max_norm: float, wire: torch.dtype, predivide: float) -> None:
        assert isinstance(weights.rule, DelayAwareOptimizer)
        self._weights = weights
        self._rule = weights.rule
        self.kernel = kernel
        self._max_norm = max_norm
        self.wire = wire
        self._replicas = 1 if weights.replicas is None else dist.get_world_size(weights.replicas)
        self._predivide = predivide
        self.over_groups: Callable[[list[Tensor]], None] = lambda gradients: None
        self._first = True
        weights.take_over()
        self._rule.flatten(weights.flat_groups(), kernel)
        self._shards: list[Tensor] | None = None
        shard = None
        if weights.sharded:
            self._shards = [torch.zeros_like(s) for s in weights.shards(weights.collect_gradients())]
            shard = dist.get_rank(weights.replicas)
        self._counted = counted_regions(weights.layouts, weights.slices, shard, self._replicas)
        self.tuned = kernel.tune(self._shards or weights.collect_gradients())

    @torch.no_grad()
    def run(self, ring: WeightRing, scale: Tensor | float, whole: float = 0.0) -> Outcome:
        """As `StageUpdate.run`; waits for nothing but the replicas."""
        weights = self._weights
        newest = ring.newest_flats
        gradients = weights.collect_gradients()
        if self._replicas > 1:
            if self._predivide != 1:
                torch._foreach_div_(gradients, self._predivide)
            gradients = reduce_gradients(gradients, self._shards, weights.replicas, self.wire)
            scale = scale * (self._replicas / self._predivide)
        self.over_groups(gradients)
        norm = self._norm(gradients, ring.device)
        following = ring.begin_update()
        outcome = self._rule.step_flat(
            self.kernel,
            gradients,
            weights.masters(newest),
            weights.shards(following),
            weights.has_masters,
            norm,
            self._max_norm,
            scale,
            whole,
        )
        weights.clear_gradients()
        if weights.sharded:
            gather_weights(following, weights.shards(following), weights.replicas)
        weights.point_at(following)
        ring.commit_update()
        if self._first:
            weights.after_first_update()
            self._first = False
        return outcome

    def add_gradient(self, param: Tensor, gradient: Tensor) -> None:
        """As `StageUpdate.add_gradient`."""
        self._weights.collect_gradients()
        params = [p for layout in self._weights.layouts for p in layout.params]
        number = next(i for i, p in enumerate(params) if p is param)
        # Some keep them flat.
        self._weights.gradient_views()[number].view(-1).add_(gradient.reshape(-1))

    def true_weights(self, ring: WeightRing) -> list[Tensor] | None:
        """As `StageUpdate.true_weights`; gathers them from the replicas."""
        if not self._rule.looks_ahead:
            return None
        return self._write_true_weights(ring, [torch.zeros_like(flat) for flat in ring.newest_flats])

    def land(self, ring: WeightRing) -> None:
        """As `StageUpdate.land`; on all replicas."""
        if self._rule.looks_ahead:
            self._write_true_weights(ring, ring.newest_flats)
            self._rule.land()

    @torch.no_grad()
    def take_off(self, ring: WeightRing, published: Sequence[Tensor]) -> None:
        """As `StageUpdate.take_off`."""
        if not self._weights.has_masters:
            self._rule.keep_true(ring.newest_flats)
        for flat, ahead in zip(ring.newest_flats, published, strict=True):
            flat.copy_(ahead)

    @property
    def looks_ahead(self) -> bool:
        """As `StageUpdate` says."""
        return self._rule.looks_ahead

    def sums(self) -> list[Tensor | None]:
        """As `StageUpdate.sums`."""
        self._weights.collect_gradients()
        return list(self._weights.gradient_views())

    @torch.no_grad()
    def set_sums(self, sums: Sequence[Tensor | None]) -> None:
        """As `StageUpdate.set_sums`."""
        self._weights.collect_gradients()
        for view, total in zip(self._weights.gradient_views(), sums, strict=True):
            assert total is not None
            view.copy_(total)

    def _write_true_weights(self, ring: WeightRing, flats: list[Tensor]) -> list[Tensor]:
        weights = self._weights
        shards = weights.shards(flats)
        self._rule.true_weights(weights.masters(ring.newest_flats), shards)
        if weights.sharded:
            gather_weights(flats, shards, weights.replicas)
        return flats

    def _norm(self, gradients: list[Tensor], device: torch.device) -> Tensor:
        slices = self._weights.slices
        if slices.size > 1:
            gradients = [gradients[r.flat].narrow(0, r.start, r.length) for r in self._counted]
        elif not self._weights.sharded and self.kernel.name != "triton":
            # Parameter by parameter where that costs nothing: bit for bit torch's own clipping.
            gradients = self._weights.gradient_views()
        norm = self.kernel.norm(gradients).to(device)  # of no tensor at all it lies on the CPU
        if self._weights.sharded:
            norm = Slices(self._weights.replicas, size=self._replicas).add_up(norm)
        return slices.add_up(norm)


class TorchUpdate(NoLookAhead):
    """By any torch optimizer, which steps in the next version's slot; float32.

    Args:
        weights: the stage's weights.
        max_norm: the stage's gradients are clipped to so much; 0 clips nothing.
        reduce: makes every parameter's gradient the replicas' mean; None where there are none.
    """

    gives_sums = True

    def __init__(self, weights: Weights, max_norm: float, reduce: Callable[[], None] | None) -> None:
        self._weights = weights
        self._max_norm = max_norm
        self._reduce = reduce

    def add_gradient(self, param: Tensor, gradient: Tensor) -> None:
        """As `StageUpdate.add_gradient`."""
        param.grad = gradient if param.grad is None else param.grad + gradient

    def sums(self) -> list[Tensor | None]:
        """As `StageUpdate.sums`."""
        return [param.grad for layout in self._weights.layouts for param in layout.params]

    def set_sums(self, sums: Sequence[Tensor | None]) -> None:
        """As `StageUpdate.set_sums`."""
        params = [param for layout in self._weights.layouts for param in layout.params]
        for param, total in zip(params, sums, strict=True):
            param.grad = None if total is None else total.to(param.device)

    @torch.no_grad()
    def run(self, ring: WeightRing, scale: Tensor | float, whole: float = 0.0) -> Outcome:
        """As `StageUpdate.run`; reads the norm."""
        if self._reduce is not None:
            self._reduce()
        parameters, slices = [p for p in ring.params if p.grad is not None], self._weights.slices
        norm = gradient_norm([p.grad for p in parameters if p.grad is not None and slices.counts(p)])
        if scale != 1.0:
            for p in parameters:
                if p.grad is not None:
                    p.grad.mul_(1.0 / scale)
            norm = norm / scale
        norm = slices.add_up(norm.to(ring.device))
        finite = math.isfinite(norm.item())
        if finite and self._max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_norm, norm.clamp(min=whole))
        ring.update_in_place(self._weights.rule, skip=not finite)
        for p in ring.params:
            p.grad = None
        return Outcome(norm, torch.full_like(norm, 0.0 if finite else 1.0))
