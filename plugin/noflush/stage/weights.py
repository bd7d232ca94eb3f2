"""How a stage keeps its weights, gradients and float32 masters: the `Weights` protocol, and the plainest of it.

A host keeps them its own way; its wing says where things lie. What is here needs no host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from noflush.methods.flat import FlatGroup
from noflush.stage.layout import FlatGradients, FlatLayout, lay_out
from noflush.stage.slices import Slices


class Weights(Protocol):
    """One stage's weights as its optimizer keeps them.

    Attributes:
        optimizer: what the host calls its optimizer.
        rule: the torch optimizer in its inside.
        layouts, home: for `versions.WeightRing`.
        replicas: the data-parallel group; None for one replica.
        slices: the ranks that share the stage by tensor parallelism.
        sharded: whether each replica updates a shard of every flat tensor (ZeRO-1).
        has_masters: whether float32 masters are kept apart from the model's weights.
    """

    optimizer: Any
    rule: Optimizer
    layouts: list[FlatLayout]
    home: list[Tensor] | None
    replicas: Any
    slices: Slices
    sharded: bool
    has_masters: bool

    def flat_groups(self) -> list[FlatGroup]:
        """What `DelayAwareOptimizer.flatten` takes."""

    def masters(self, newest: list[Tensor]) -> list[Tensor]:
        """Flat float32 weights that the rule updates; ``newest``: the newest version's flat tensors."""

    def shards(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """This replica's part of each flat tensor (all of it without ZeRO)."""

    def point_at(self, flats: list[Tensor]) -> None:
        """Has the optimizer write its next weights into ``flats``."""

    def collect_gradients(self) -> list[Tensor]:
        """Flat gradients of the whole stage, this replica's sum over the batch."""

    def gradient_views(self) -> list[Tensor]:
        """The same, parameter by parameter."""

    def clear_gradients(self) -> None:
        """Zeros everywhere, after an update that cleared no more than this replica's shards."""

    def take_over(self) -> None:
        """Readies gradients for a rule of noflush's, in place of the host's own handling."""

    def after_first_update(self) -> None:
        """What the host does once optimizer state exists."""


class OwnGradients:
    """Gradients in flat tensors of noflush's, in the weights' dtype, from `take_over` on."""

    layouts: list[FlatLayout]
    _gradients: FlatGradients

    def take_over(self) -> None:
        self._gradients = FlatGradients(self.layouts)

    def collect_gradients(self) -> list[Tensor]:
        return self._gradients.collect()

    def gradient_views(self) -> list[Tensor]:
        return self._gradients.views


class PlainWeights(OwnGradients):
    """float32 weights, updated where they are; a rule's state is kept parameter by parameter."""

    sharded = False
    has_masters = False
    home: list[Tensor] | None = None

    def __init__(self, optimizer: Any, replicas: Any, slices: Slices) -> None:
        self.optimizer = self.rule = optimizer
        self.replicas = replicas
        self.slices = slices
        self._groups = []
        self.layouts = []
        for number, group in enumerate(optimizer.param_groups):
            # What is frozen has no gradient, and so one version for ever.
            for layout in lay_out(p for p in group["params"] if p.requires_grad):
                self._groups.append(FlatGroup.of(number, layout.params, layout.offsets, layout.numel))
                self.layouts.append(layout)

    def flat_groups(self) -> list[FlatGroup]:
        return self._groups

    def masters(self, newest: list[Tensor]) -> list[Tensor]:
        return newest

    def shards(self, flats: Sequence[Tensor]) -> list[Tensor]:
        return list(flats)

    def point_at(self, flats: list[Tensor]) -> None:
        """Nothing: whoever updates is given the flat tensors."""

    def clear_gradients(self) -> None:
        """Nothing: the update clears all it reads."""

    def after_first_update(self) -> None:
        """Nothing."""


# torch 2.13 has new names for these two.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def gather_weights(flats: Sequence[Tensor], shards: Sequence[Tensor], replicas: Any) -> None:
    """Fills each flat tensor with all replicas' shards; ``shards`` are this one's views into them."""
    for flat, shard in zip(flats, shards, strict=True):
        _all_gather(flat, shard, group=replicas)


def reduce_gradients(
    flats: Sequence[Tensor], shards: Sequence[Tensor] | None, replicas: Any, dtype: torch.dtype
) -> list[Tensor]:
    """Sums flat gradients over the replicas in ``dtype``.

    Returns the flat tensors, summed in place; or with ``shards`` (buffers of a shard each) those, holding this
    replica's part of the sums.
    """
    if shards is None:
        for flat in flats:
            wire = flat if flat.dtype == dtype else flat.to(dtype)
            dist.all_reduce(wire, group=replicas)
            if wire is not flat:
                flat.copy_(wire)
        return list(flats)
    for flat, shard in zip(flats, shards, strict=True):
        if flat.dtype == dtype:
            _reduce_scatter(shard, flat, group=replicas)
        else:
            wire = shard.to(dtype)
            _reduce_scatter(wire, flat.to(dtype), group=replicas)
            shard.copy_(wire)
    return list(shards)
