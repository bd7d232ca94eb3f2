"""Which gradients count in a stage's norm when tensor parallelism spreads the stage over several ranks, its slices.

A parameter that is split counts on every slice; one that every slice holds whole (a norm's weight, a bias behind a
row-parallel layer) counts on the first alone; of tied copies the first counts. The rules and the flags' names are those
of Megatron and DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from noflush.stage.layout import FlatLayout
from noflush.stage.waits import Waits


def is_split(param: Parameter) -> bool:
    """Whether every slice holds another part of ``param``."""
    return bool(getattr(param, "tensor_model_parallel", False) or getattr(param, "model_parallel", False))


@dataclass(frozen=True)
class StageSlices:
    """The ranks that share one stage of one replica: a `matrices.Gather`."""

    group: Any
    rank: int
    size: int

    def gather(self, t: Tensor, dim: int) -> Tensor:
        """As `matrices.Gather.gather`."""
        parts = [torch.empty_like(t) for _ in range(self.size)]
        dist.all_gather(parts, t.contiguous(), group=self.group)
        return torch.cat(parts, dim)


@dataclass(frozen=True)
class Slices:
    """The ranks over which a norm is taken: those that share one stage of one replica.

    With tied layers (under the flush) all stages of the replica.

    Attributes:
        group: their process group; None stands for one rank.
        rank: this one's place among its stage's slices.
        size: how many ranks the group has.
        of_stage: where the group spans the pipeline, this stage's slices alone.
        waits: for the others; with a flush a stage that is done waits here for all others.
    """

    group: Any = None
    rank: int = 0
    size: int = 1
    of_stage: StageSlices | None = None
    waits: Waits = field(default_factory=Waits, compare=False)

    def counts(self, param: Parameter) -> bool:
        """Whether this slice's gradient of ``param`` goes into the stage's norm."""
        return (self.rank == 0 or is_split(param)) and not getattr(param, "ds_pipe_replicated", False)

    def add_up(self, norm: Tensor) -> Tensor:
        """The stage's norm from every slice's own: 0-dim float32. Alike, bit for bit, on all slices."""
        if self.size == 1:
            return norm
        square = norm.double() ** 2
        with self.waits.counted():
            dist.all_reduce(square, group=self.group)
        return square.sqrt().float()

    # What DeepSpeed's optimizers ask a Megatron "mpu" for, where they take norms.

    def get_model_parallel_group(self) -> Any:
        """The group over which DeepSpeed adds norms up: this stage's slices, not the pipeline."""
        return self.group

    def get_tensor_model_parallel_rank(self) -> int:
        """As `rank`."""
        return self.rank


@dataclass(frozen=True)
class Region:
    """Elements [start, start + length) of flat tensor number ``flat``."""

    flat: int
    start: int
    length: int


def counted_regions(layouts: Sequence[FlatLayout], slices: Slices, shard: int | None, shards: int) -> list[Region]:
    """Where the counted gradients lie in each flat tensor, or in its shard number ``shard`` of ``shards``.

    Neighbours are joined; gaps between parameters hold zeros and so may be taken in.
    """
    regions = []
    for number, layout in enumerate(layouts):
        length = layout.numel // shards if shard is not None else layout.numel
        low = shard * length if shard is not None else 0
        runs: list[list[int]] = []
        previous_counts = False
        for param, offset in zip(layout.params, layout.offsets, strict=True):
            counts = slices.counts(param)
            if counts and previous_counts:
                runs[-1][1] = offset + param.numel()
            elif counts:
                runs.append([offset, offset + param.numel()])
            previous_counts = counts
        for start, end in runs:
            start, end = max(start, low), min(end, low + length)
            if start < end:
                regions.append(Region(number, start - low, end - start))
    return regions
