"""Gradients of a stage in flat tensors: one norm, one reduction and one update over each, and no allocation.

Autograd adds into ``param.grad`` where one is set, so a view of a flat tensor that stays set collects a batch's
gradients in place. A parameter that no loss reaches has a gradient of zeros, as under DeepSpeed's ZeRO.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from noflush.stage.versions import FlatLayout


class FlatGradients:
    """Flat gradients in the parameters' dtype.

    Args:
        layouts: how the parameters lie; the gradients lie alike.
    """

    def __init__(self, layouts: Sequence[FlatLayout]) -> None:
        self._params = [param for layout in layouts for param in layout.params]
        self.flats = [layout.new_flat() for layout in layouts]
        self.views = [v for layout, flat in zip(layouts, self.flats, strict=True) for v in layout.views(flat)]
        for param, view in zip(self._params, self.views, strict=True):
            param.grad = view

    def collect(self) -> list[Tensor]:
        """The flat gradients, after taking in what others put in place of the views (or took away)."""
        for param, view in zip(self._params, self.views, strict=True):
            if param.grad is None:
                view.zero_()
            elif param.grad.data_ptr() != view.data_ptr():
                view.copy_(param.grad)
            param.grad = view
        return self.flats

    def clear(self) -> None:
        """Zeros everywhere."""
        for flat in self.flats:
            flat.zero_()
