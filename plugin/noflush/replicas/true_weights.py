"""A stage's true weights as one row of float32 numbers, gaps left out: what is averaged, and what a newcomer is given.

The true weights are the float32 masters where there are any, else what a look-ahead keeps apart, else the newest
version. They lie in one process: data and tensor parallelism within a group are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from noflush.methods.matrices import is_gap
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.stage.layout import FlatLayout
from noflush.stage.versions import WeightRing
from noflush.stage.weights import Weights


class TrueWeights:
    """Those of one stage.

    Args:
        weights, ring: the stage's.

    Attributes:
        elements: how many numbers they are.
    """

    def __init__(self, weights: Weights, ring: WeightRing) -> None:
        self._weights, self._ring = weights, ring
        self.elements = sum(p.numel() for layout in weights.layouts for p in layout.params if not is_gap(p))

    def flats(self) -> list[Tensor]:
        """The flat tensors that hold them, one a layout."""
        masters = self._weights.masters(self._ring.newest_flats)
        rule = self._weights.rule
        return rule.true_flats(masters) if isinstance(rule, DelayAwareOptimizer) else masters

    @torch.no_grad()
    def read(self, start: int, length: int) -> Tensor:
        """Numbers [start, start + length): float32 [length] in host memory, a copy."""
        flats = self.flats()
        parts = [flats[i][where].float() for i, where, _ in _pieces(self._weights.layouts, start, length)]
        return torch.cat(parts).cpu() if parts else torch.empty(0)

    @torch.no_grad()
    def shift(self, start: int, change: Tensor) -> None:
        """Adds ``change`` (float32, in host memory) to numbers from ``start`` on, and to what forwards use.

        Right after an update, when no micro-batch uses the newest version yet.
        """
        true, published = self.flats(), self._ring.newest_flats
        rule = self._weights.rule
        ahead = isinstance(rule, DelayAwareOptimizer) and rule.looks_ahead
        for i, where, within in _pieces(self._weights.layouts, start, change.numel()):
            part = change[within].to(true[i].device)
            true[i][where].add_(part)
            if published[i] is true[i] or published[i].data_ptr() == true[i].data_ptr():
                continue
            if ahead:
                published[i][where].add_(part)
            else:
                published[i][where].copy_(true[i][where])

    @torch.no_grad()
    def replace(self, flats: Sequence[Tensor]) -> None:
        """All of them, on a drained stage: forwards use them too."""
        for true, published, new in zip(self.flats(), self._ring.newest_flats, flats, strict=True):
            true.copy_(new)
            published.copy_(new)


def _pieces(layouts: Sequence[FlatLayout], start: int, length: int) -> Iterator[tuple[int, slice, slice]]:
    """Where numbers [start, start + length) lie: which flat tensor, where in it, and which of the numbers."""
    passed = 0
    for number, layout in enumerate(layouts):
        for p, offset in zip(layout.params, layout.offsets, strict=True):
            if is_gap(p):
                continue
            low, high = max(start, passed), min(start + length, passed + p.numel())
            if low < high:
                yield number, slice(offset + low - passed, offset + high - passed), slice(low - start, high - start)
            passed += p.numel()
