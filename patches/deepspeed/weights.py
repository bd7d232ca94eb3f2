"""How DeepSpeed's optimizers keep a stage's weights, gradients and float32 masters.

Three of them work under noflush. Each is wrapped by one class here, which says where things lie, redirects what the
optimizer writes into the slot of the next weight version, and keeps its norms within the stage: DeepSpeed adds them
up over the whole pipeline, which no stage may wait for.

    float32, ZeRO 0                        any torch optimizer             PlainWeights
    bf16 (ZeRO 0), bf16 + fp32 accumulation (ZeRO 1)      BF16_Optimizer   Bf16Weights
    float32, bf16 or fp16, ZeRO 1          DeepSpeedZeroOptimizer          ZeroWeights
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.optim import Optimizer

from noflush.methods.flat import FlatGroup
from noflush.stage.layout import layout_within
from noflush.stage.slices import Slices
from noflush.stage.weights import OwnGradients, PlainWeights, Weights


class _MasterWeights:
    """What DeepSpeed's two optimizers with float32 masters share: a flat tensor a group, updated in shards."""

    has_masters = True
    home: list[Tensor] | None

    def __init__(
        self, optimizer: Any, groups: Sequence[Sequence[Any]], flats: Sequence[Tensor], slices: Slices
    ) -> None:
        self.optimizer = optimizer
        self.slices = slices
        self.rule = optimizer.optimizer
        self.home = [flat.detach() for flat in flats]
        self.layouts = [layout_within(group, flat) for group, flat in zip(groups, self.home, strict=True)]
        self.replicas = optimizer.dp_process_group
        self.sharded = dist.get_world_size(self.replicas) > 1
        self._rank = dist.get_rank(self.replicas)

    def _masters(self) -> Sequence[Tensor]:
        """The optimizer's own list: this replica's shard of each group."""
        raise AssertionError(f"{type(self).__name__} must define _masters")

    def flat_groups(self) -> list[FlatGroup]:
        assert len(self.rule.param_groups) == len(self._masters())
        return [
            FlatGroup(number, (m,), (0,), m.numel(), layout.pieces_within(self._rank * m.numel(), m.numel()))
            for number, (m, layout) in enumerate(zip(self._masters(), self.layouts, strict=True))
        ]

    def masters(self, newest: list[Tensor]) -> list[Tensor]:
        return [m.data for m in self._masters()]

    def shards(self, flats: Sequence[Tensor]) -> list[Tensor]:
        return [
            flat.narrow(0, self._rank * m.numel(), m.numel()) for flat, m in zip(flats, self._masters(), strict=True)
        ]

    def after_first_update(self) -> None:
        self.optimizer._lazy_init_hp_params_optimizer_state()


class Bf16Weights(_MasterWeights):
    """`BF16_Optimizer`: bf16 weights, gradients summed in a flat tensor of its own."""

    def __init__(self, optimizer: BF16_Optimizer, slices: Slices) -> None:
        super().__init__(optimizer, optimizer.bf16_groups, optimizer.bf16_groups_flat, slices)
        optimizer.mpu = slices if slices.size > 1 else None  # it serves norms alone

    def _masters(self) -> Sequence[Tensor]:
        masters: list[Tensor] = self.optimizer.fp32_groups_flat_partition
        return masters

    def point_at(self, flats: list[Tensor]) -> None:
        self.optimizer.bf16_groups_flat = list(flats)
        self.optimizer.bf16_partitioned_groups = [
            [flat.narrow(0, i * m.numel(), m.numel()) for i in range(dist.get_world_size(self.replicas))]
            for flat, m in zip(flats, self._masters(), strict=True)
        ]

    def take_over(self) -> None:
        """Nothing: `BF16_Optimizer` collects gradients in flat tensors itself."""

    def collect_gradients(self) -> list[Tensor]:
        return list(self.optimizer.fp32_groups_gradients_flat)

    def gradient_views(self) -> list[Tensor]:
        return [view for group in self.optimizer.fp32_groups_gradients for view in group]

    def sums(self) -> list[Tensor | None]:
        """As `StageUpdate.sums`, where an optimizer of another's updates."""
        flags = [flag for group in self.optimizer.fp32_groups_has_gradients for flag in group]
        return [view if flag else None for view, flag in zip(self.gradient_views(), flags, strict=True)]

    def set_sums(self, sums: Sequence[Tensor | None]) -> None:
        """As `StageUpdate.set_sums`."""
        found = iter(sums)
        for views, flags in zip(
            self.optimizer.fp32_groups_gradients, self.optimizer.fp32_groups_has_gradients, strict=True
        ):
            for i, view in enumerate(views):
                total = next(found)
                flags[i] = total is not None
                if total is not None:
                    view.copy_(total)

    def clear_gradients(self) -> None:
        # The sums were cleared by the update where it read them; a shard's neighbours were not.
        if self.sharded:
            self.optimizer.clear_hp_grads()
        self.optimizer.clear_lp_grads(set_to_none=True)


class ZeroWeights(OwnGradients, _MasterWeights):
    """`DeepSpeedZeroOptimizer`, stage 1: weights of any dtype, gradients in theirs."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, slices: Slices) -> None:
        super().__init__(optimizer, optimizer.bit16_groups, optimizer.bit16_groups_flat, slices)
        optimizer.model_parallel_group = slices.group  # norms and overflow within the stage
        optimizer.model_parallel_rank = slices.rank
        optimizer.check_grad_overflow = True
        # The ring alone points parameters at storage; the scale follows the travelling one.
        optimizer._update_model_bit16_weights = _nothing
        optimizer._update_scale = _nothing

    def _masters(self) -> Sequence[Tensor]:
        masters: list[Tensor] = self.optimizer.single_partition_of_fp32_groups
        return masters

    def point_at(self, flats: list[Tensor]) -> None:
        self.optimizer.bit16_groups_flat = list(flats)
        self.optimizer.parallel_partitioned_bit16_groups = [
            self.optimizer.get_data_parallel_partitions(flat, i) for i, flat in enumerate(flats)
        ]

    def take_over(self) -> None:
        # Its hooks would fill reduction buckets of half a billion elements that nobody empties.
        for hook in self.optimizer._grad_acc_hooks:
            hook.remove()
        super().take_over()

    def clear_gradients(self) -> None:
        if self.sharded:
            self._gradients.clear()


def weights_of(optimizer: Any, replicas: Any, slices: Slices) -> Weights:
    """The class that fits DeepSpeed's ``optimizer``; ``replicas``: the engine's data-parallel group."""
    if isinstance(optimizer, BF16_Optimizer):
        return Bf16Weights(optimizer, slices)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return ZeroWeights(optimizer, slices)
    assert isinstance(optimizer, Optimizer), f"{type(optimizer).__name__}: config.py should have refused this run"
    return PlainWeights(optimizer, replicas, slices)


def _nothing(*_: Any) -> None:
    pass
