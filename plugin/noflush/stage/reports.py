"""What a finished batch's report says on its way up the pipeline, and what a stage has read in them.

A report goes with the last gradient message of every batch: the last stage puts in the losses and the loss scale,
each stage adds its own figures and keeps what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from noflush.stage.skips import SkippedUpdates


@dataclass(frozen=True)
class ReportLayout:
    """Positions in a report, a vector of float64.

    Attributes:
        losses: the batch's mean loss and the module's additional losses.
        stages: pipeline stages.
    """

    losses: int
    stages: int

    @property
    def words(self) -> int:
        """Length of the vector."""
        return self.losses + 3 * self.stages + 2

    @property
    def bubbles(self) -> slice:
        """Every stage's bubble fraction as last measured."""
        return slice(self.losses, self.losses + self.stages)

    @property
    def skipped(self) -> slice:
        """Every stage's updates skipped so far."""
        return slice(self.losses + self.stages, self.losses + 2 * self.stages)

    @property
    def in_a_row(self) -> slice:
        """Every stage's newest updates skipped without a break."""
        return slice(self.losses + 2 * self.stages, self.losses + 3 * self.stages)

    @property
    def stop(self) -> int:
        """1.0 if a stage so far was asked to stop, else nan."""
        return self.words - 2

    @property
    def scale(self) -> int:
        """The loss scale the batch's gradients carry."""
        return self.words - 1


class BatchReports:
    """One stage's reports.

    Args:
        layout: of the reports.
        stage: this stage.
        device: where reports live.

    Attributes:
        newest: the newest report, or None.
        step: the call (from 1) whose batch it reports, or None.
        bubble: this stage's bubble as last measured.
        stop: whether this rank was asked to stop.
    """

    def __init__(self, layout: ReportLayout, stage: int, device: torch.device) -> None:
        self.layout = layout
        self.newest: Tensor | None = None
        self.step: int | None = None
        self.bubble = math.nan
        self.stop = False
        self._stage = stage
        self._device = device

    def first(self, losses: Tensor, scale: Tensor | float) -> Tensor:
        """The last stage's report of a batch: its mean ``losses`` [losses] and loss scale."""
        report = torch.full((self.layout.words,), math.nan, dtype=torch.float64, device=self._device)
        report[: self.layout.losses] = losses
        report[self.layout.scale] = scale
        return report

    def add(self, received: Tensor, step: int, skips: SkippedUpdates) -> Tensor:
        """``received`` with this stage's figures; the newest report from now on, that of call ``step``."""
        report = received.clone()
        report[self.layout.bubbles][self._stage] = self.bubble
        report[self.layout.skipped][self._stage] = skips.total
        report[self.layout.in_a_row][self._stage] = skips.in_a_row
        if self.stop:
            report[self.layout.stop] = 1.0
        self.newest, self.step = report, step
        return report

    def bubbles(self) -> list[float]:
        """Every stage's bubble as last heard from it (nan: never), this stage's newest."""
        return self._heard(self.layout.bubbles, self.bubble, float)

    def skipped(self, mine: int) -> list[int]:
        """Every stage's skipped updates as last heard from it; this stage's are ``mine``."""
        return self._heard(self.layout.skipped, mine, lambda n: 0 if math.isnan(n) else int(n))

    def _heard(self, where: slice, mine: float, read: Callable[[float], float]) -> list:  # type: ignore[type-arg]
        heard = [math.nan] * self.layout.stages if self.newest is None else self.newest[where].tolist()
        heard[self._stage] = mine
        return [read(n) for n in heard]

    def scale(self) -> float | None:
        """The newest batch's loss scale; None before any."""
        return None if self.newest is None else float(self.newest[self.layout.scale])

    def clear(self) -> None:
        """Forgets what was read, after a checkpoint was loaded."""
        self.newest = self.step = None
