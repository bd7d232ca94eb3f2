"""Where a stage's parameters lie in flat tensors, and their gradients alike.

One norm, one reduction and one update over each, and no allocation: autograd adds into ``param.grad`` where one is set,
so a view of a flat tensor that stays set collects a batch's gradients in place. A parameter that no loss reaches has a
gradient of zeros, as under DeepSpeed's ZeRO.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from noflush.methods.matrices import Piece, is_gap, piece_of

# Bytes. Matrix kernels may choose another code path for another alignment; torch's own allocator gives 64.
_ALIGNMENT = 64


class WeightVersionError(RuntimeError):
    """A backward would have seen other weights than its forward: a fault of the engine, never of the user."""


@dataclass(frozen=True)
class FlatLayout:
    """Where parameters of one dtype and device lie in a flat tensor of ``numel`` elements.

    Attributes:
        params: the parameters.
        offsets: of each one's first element.
        numel: length, gaps and padding included.
    """

    params: tuple[Parameter, ...]
    offsets: tuple[int, ...]
    numel: int

    def new_flat(self) -> Tensor:
        """Zeros in this layout."""
        return torch.zeros(self.numel, dtype=self.params[0].dtype, device=self.params[0].device)

    def pieces_within(self, start: int, length: int) -> tuple[Piece, ...] | None:
        """The parameters in elements [start, start + length), counted from there; no gaps; None if one is cut."""
        found = []
        for p, offset in zip(self.params, self.offsets, strict=True):
            first, last = offset - start, offset - start + p.numel()
            if is_gap(p):
                continue
            if first >= 0 and last <= length:
                found.append(piece_of(p, first))
            elif first < length and last > 0:
                return None
        return tuple(found)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part of ``flat``, in its shape."""
        return [
            flat[offset : offset + p.numel()].view(p.shape) for p, offset in zip(self.params, self.offsets, strict=True)
        ]


def lay_out(params: Iterable[Parameter]) -> list[FlatLayout]:
    """One layout a dtype and device, every parameter aligned to 64 bytes."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Parameter]] = {}
    for param in params:
        kinds.setdefault((param.dtype, param.device), []).append(param)
    layouts = []
    for (dtype, _), members in kinds.items():
        unit = max(1, _ALIGNMENT // dtype.itemsize)
        offsets, total = [], 0
        for param in members:
            offsets.append(total)
            total += -(-param.numel() // unit) * unit
        layouts.append(FlatLayout(tuple(members), tuple(offsets), total))
    return layouts


def layout_within(params: Iterable[Parameter], flat: Tensor) -> FlatLayout:
    """The layout of parameters that are views into ``flat`` already. Raises WeightVersionError if one is not."""
    members, offsets = tuple(params), []
    for param in members:
        offset, rest = divmod(param.data_ptr() - flat.data_ptr(), flat.element_size())
        if rest or not 0 <= offset <= flat.numel() - param.numel() or not param.is_contiguous():
            shape = tuple(param.shape)
            raise WeightVersionError(f"a parameter of shape {shape} lies outside its optimizer's flat tensor")
        offsets.append(offset)
    return FlatLayout(members, tuple(offsets), flat.numel())


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
