"""Codecs: a floating-point tensor in fewer bytes, and back. Plain tensor arithmetic, no messages.

Each computes in float32, whatever the model's dtype, so that fp16's loss scale neither overflows nor vanishes: a tile's
scale follows its values. Nothing is read back from a device. A tile with a value that is not finite arrives as nan
throughout, so that the update it is for is skipped as it would have been.

Rounding is to nearest, or stochastic (Gupta et al., ICML 2015, arXiv 1502.02551): up with the probability of the part
cut off, which makes the sum of many gradients right on average. A number that a codec can state comes back as it was
in both. The Walsh-Hadamard rotation before ``int4`` spreads a tile's outlier over the whole tile (as QuaRot does with
activations, Ashkboos et al. 2024, arXiv 2404.00456).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from noflush.methods.elementwise import noise, round_stochastically
from noflush.order.wire_format import TILE, WireName, coded_bytes, tile_count
from noflush.stage.messages import TensorSpec


class Codec(Protocol):
    """One form on the wire. ``seed``: of the noise that rounds stochastically; None rounds to nearest."""

    def coded(self, spec: TensorSpec) -> TensorSpec:
        """What a tensor like ``spec`` is on the wire."""

    def encode(self, tensor: Tensor, seed: int | None) -> Tensor:
        """``tensor``, of any floating dtype and shape, as it travels."""

    def decode(self, coded: Tensor, spec: TensorSpec) -> Tensor:
        """A new tensor like ``spec`` from what was received."""


class Bf16:
    """The upper half of every float32: range kept, 8 bits of precision."""

    def coded(self, spec: TensorSpec) -> TensorSpec:
        """As `Codec.coded`: the same shape."""
        return TensorSpec(spec.shape, torch.bfloat16, False)

    def encode(self, tensor: Tensor, seed: int | None) -> Tensor:
        """As `Codec.encode`."""
        if seed is None:
            return tensor.to(torch.bfloat16)
        values = tensor.float().contiguous()
        index = torch.arange(values.numel(), device=values.device).view(values.shape)
        rounded = round_stochastically(values, noise(index, seed) & 0xFFFF)
        # The sum of a nan's bits and noise may be another number.
        return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))

    def decode(self, coded: Tensor, spec: TensorSpec) -> Tensor:
        """As `Codec.decode`."""
        return coded.to(spec.dtype)


@dataclass(frozen=True)
class Tiles:
    """Whole numbers from -``most`` to ``most``, and a float32 scale for each tile of `TILE` numbers.

    Attributes:
        name: of the form.
        most: largest code.
        rotated: whether tiles are rotated first; two codes then share a byte.
    """

    name: WireName
    most: int
    rotated: bool

    def coded(self, spec: TensorSpec) -> TensorSpec:
        """As `Codec.coded`: bytes, all scales first."""
        return TensorSpec((coded_bytes(self.name, torch.Size(spec.shape).numel()),), torch.uint8, False)

    def encode(self, tensor: Tensor, seed: int | None) -> Tensor:
        """As `Codec.encode`."""
        count = tile_count(tensor.numel())
        tiles = torch.zeros(count, TILE, device=tensor.device)
        tiles.view(-1)[: tensor.numel()] = tensor.reshape(-1)
        if self.rotated:
            tiles = rotate(tiles)
        largest = tiles.abs().amax(dim=1, keepdim=True)  # nan if one of them is
        scales = torch.where(largest.isfinite(), largest / self.most, torch.nan)
        steps = tiles / torch.where(scales > 0, scales, 1.0)
        codes = _round(steps, seed).clamp_(-self.most, self.most).nan_to_num_(0.0).to(torch.int8)
        if self.rotated:
            codes = _pack(codes)
        return torch.cat([scales.view(torch.uint8).reshape(-1), codes.view(torch.uint8).reshape(-1)])

    def decode(self, coded: Tensor, spec: TensorSpec) -> Tensor:
        """As `Codec.decode`. What rounding has lifted above the dtype's largest number becomes that."""
        numbers = torch.Size(spec.shape).numel()
        count = tile_count(numbers)
        scales = coded[: 4 * count].view(torch.float32).view(count, 1)
        codes = coded[4 * count :].view(count, -1)
        tiles = (_unpack(codes) if self.rotated else codes.view(torch.int8)) * scales
        if self.rotated:
            tiles = rotate(tiles) / TILE
        largest = torch.finfo(spec.dtype).max
        return tiles.view(-1)[:numbers].clamp(-largest, largest).to(spec.dtype).view(spec.shape)


def rotate(tiles: Tensor) -> Tensor:
    """Each row [n, TILE] times the Walsh-Hadamard matrix of +1 and -1: its own inverse but for a factor `TILE`.

    By butterflies, whose sums come in one order on every machine.
    """
    half = 1
    while half < TILE:
        pairs = tiles.view(tiles.shape[0], -1, 2, half)
        one, other = pairs[:, :, 0], pairs[:, :, 1]
        tiles = torch.stack([one + other, one - other], dim=2).view(-1, TILE)
        half *= 2
    return tiles


def _round(steps: Tensor, seed: int | None) -> Tensor:
    if seed is None:
        return steps.round()
    low = steps.floor()
    index = torch.arange(steps.numel(), device=steps.device).view(steps.shape)
    share = (noise(index, seed) >> 8).float() * 2.0**-24  # from 0 on and below 1, exact in float32
    return low + (share < steps - low)


def _pack(codes: Tensor) -> Tensor:
    """[n, TILE] int8 from -7 to 7 -> [n, TILE / 2] bytes: a tile's first half in the lower bits."""
    raised = (codes + 8).view(torch.uint8)
    return raised[:, : TILE // 2] | raised[:, TILE // 2 :] << 4


def _unpack(packed: Tensor) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=1).view(torch.int8) - 8


CODECS: dict[WireName, Codec] = {
    "bf16": Bf16(),
    "int8": Tiles("int8", 127, rotated=False),
    "int4": Tiles("int4", 7, rotated=True),
}
"""What each name of `wire_format.WireName` but ``model`` does."""
