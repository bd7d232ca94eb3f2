"""What a batch's report says on its way up the pipeline, and at which position. Pure: no torch.

It goes with the last gradient message of every batch; each stage adds its own figures.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportLayout:
    """Positions in the report, a vector of float64.

    Attributes:
        losses: the batch's mean loss and the module's additional losses.
        stages: pipeline stages.
    """

    losses: int
    stages: int

    @property
    def words(self) -> int:
        """Length of the vector."""
        return self.losses + 3 * self.stages + 1

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
    def scale(self) -> int:
        """The loss scale the batch's gradients carry."""
        return self.words - 1
