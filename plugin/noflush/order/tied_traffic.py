"""What a tied embedding adds to the links of a pipeline without a flush, against the activations. Pure.

Once a batch its version goes down through every link and its gradient comes up through every link; activations and
their gradients go by micro-batch, K times as often.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor

ENOUGH = Fraction(1, 20)
"""Share of the activations' bytes under which a tied weight's count as little."""


@dataclass(frozen=True)
class TiedTraffic:
    """Bytes through one link in one direction; the other direction has as many.

    Attributes:
        tied: of the weight, a batch.
        activations: a micro-batch.
        gas: K, micro-batches a batch.
    """

    tied: int
    activations: int
    gas: int

    @property
    def share(self) -> float:
        """The weight's bytes over the activations', of a batch."""
        return self.tied / (self.gas * self.activations)

    @property
    def enough_gas(self) -> int:
        """The smallest K at which the share is under `ENOUGH`."""
        return floor(Fraction(self.tied, self.activations) / ENOUGH) + 1


def tied_traffic(
    vocabulary: int, hidden: int, sequence: int, micro_batch: int, gas: int, width: int, tensor: int = 1
) -> TiedTraffic:
    """Of an embedding of ``vocabulary`` x ``hidden`` numbers, ``width`` bytes each, on one of ``tensor`` slices.

    Activations are ``micro_batch`` x ``sequence`` x ``hidden`` numbers of the same width, whole on every slice.
    """
    return TiedTraffic(vocabulary * hidden * width // tensor, micro_batch * sequence * hidden * width, gas)
