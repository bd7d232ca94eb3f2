"""How tensor-parallel slices divide a GPT's weights, by megatron-core's names. Imports no host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FC1 = "mlp.linear_fc1."
_SPLIT = {
    "embedding.word_embeddings.weight": 0,
    "self_attention.linear_qkv.weight": 0,
    "self_attention.linear_qkv.bias": 0,
    "self_attention.linear_proj.weight": 1,
    "mlp.linear_fc1.weight": 0,
    "mlp.linear_fc1.bias": 0,
    "mlp.linear_fc2.weight": 1,
    "output_layer.weight": 0,
}
"""Dimension along which slices divide a weight; the others are whole on every slice."""


def _dimension(name: str) -> int | None:
    return next((dim for ending, dim in _SPLIT.items() if name.endswith(ending)), None)


@dataclass(frozen=True)
class GptSlices:
    """A `patches.deepspeed.slice_rule.SliceRule`, of weights and of whatever has their shapes.

    Attributes:
        gated: whether the MLP is: its slice is then its part of the gate, and behind it that of up.
    """

    gated: bool

    def merge(self, name: str, slices: Sequence[Tensor]) -> Tensor:
        """One weight of its ``slices``, in order.

        Grouped query heads need nothing more: a slice's rows of the QKV projection are those of its groups.
        """
        dim = _dimension(name)
        if dim is None or len(slices) == 1:
            return slices[0]
        if self.gated and _FC1 in name:
            halves = [part.chunk(2) for part in slices]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return torch.cat(list(slices), dim)

    def split(self, name: str, weight: Tensor, count: int) -> list[Tensor]:
        """`merge`'s reverse: ``count`` slices."""
        dim = _dimension(name)
        if dim is None or count == 1:
            return [weight] * count
        if self.gated and _FC1 in name:
            gate, up = weight.chunk(2)
            return [torch.cat(pair) for pair in zip(gate.chunk(count), up.chunk(count), strict=True)]
        return list(weight.chunk(count, dim))
