"""Where a rank stands among all that train together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ranks:
    """The pipelines of a job, and this rank's place.

    Attributes:
        pipelines: global ranks of each pipeline's stages, in stage order: one a replica and tensor-parallel slice; the
            same on every rank.
        rank: this process.
        replicas: data-parallel replicas.
        replica: this rank's.
        group: process group of this rank's pipeline; None: the world.
    """

    pipelines: Sequence[Sequence[int]]
    rank: int
    replicas: int = 1
    group: Any = None
    replica: int = 0

    @property
    def stages(self) -> int:
        """P."""
        return len(self.pipelines[0])

    @property
    def stage(self) -> int:
        """This rank's."""
        return next(list(ranks).index(self.rank) for ranks in self.pipelines if self.rank in ranks)

    @property
    def world(self) -> int:
        """All ranks."""
        return len(self.pipelines) * self.stages

    def name(self, rank: int) -> str:
        """How a rank is called in errors."""
        for ranks in self.pipelines:
            if rank in ranks:
                return f"stage {list(ranks).index(rank)} (rank {rank})"
        return f"rank {rank}"
