"""A small GPT as a list of layers, each a plain module from tensor to tensor, ready for any pipeline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from noflush.methods.matrices import set_cut


class Embedding(nn.Module):
    """Token and position embeddings: [batch, sequence] int64 -> [batch, sequence, width]."""

    def __init__(self, vocabulary: int, sequence: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(sequence, width)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded: Tensor = self.token(tokens) + self.position(positions)
        return embedded


class Block(nn.Module):
    """One pre-norm transformer block: [batch, sequence, width] -> the same. ``depth`` blocks scale the residuals."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        set_cut(self.qkv.weight, 1, (width,) * 3)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for residual in (self.out, self.down):
            nn.init.normal_(residual.weight, std=0.02 / math.sqrt(2 * depth))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.down(functional.gelu(self.up(self.norm_mlp(x))))
        return x


class Head(nn.Module):
    """Final norm and logits: [batch, sequence, width] -> [batch, sequence, vocabulary]."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.logits.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.norm(x))
        return logits


def gpt_layers(vocabulary: int, sequence: int, width: int, heads: int, depth: int) -> list[nn.Module]:
    """The layers of a GPT of ``depth`` blocks. Seed torch first for the same weights everywhere."""
    blocks = [Block(width, heads, depth) for _ in range(depth)]
    return [Embedding(vocabulary, sequence, width), *blocks, Head(width, vocabulary)]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats: [batch, sequence, vocabulary] and [batch, sequence] int64 -> 0-dim."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def split_by_blocks(layers: Sequence[nn.Module], stages: int) -> list[nn.Sequential]:
    """Layers in ``stages`` runs of equally many blocks; embedding joins the first run and head the last.

    Raises ValueError if the blocks do not divide.
    """
    depth = len(layers) - 2
    if depth % stages:
        raise ValueError(f"{depth} blocks do not divide into {stages} stages; use a multiple of {stages}")
    per = depth // stages
    cuts = [0, *(1 + per * s for s in range(1, stages)), len(layers)]
    return [nn.Sequential(*layers[a:b]) for a, b in itertools.pairwise(cuts)]
