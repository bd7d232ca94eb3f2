"""What of a message is coded, and with which noise: the same on both ends of a link, and in the simulator.

Coded are activations that train and their gradients, of float32, float16 and bfloat16, where that makes them smaller.
All else travels as it is: whole numbers, masks, what needs no gradient, float64, reports, tied weights and their
gradients.

Gradients are rounded stochastically. The noise belongs to the link: it follows from the link, the replica, the batch
and the micro-batch within it alone, so that a resumed run draws the same, and nothing else's random numbers move.
Slices of one stage under tensor parallelism hold the same gradient, and so draw the same noise.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from noflush.order.wire_format import Wire, WireName, wire_bytes
from noflush.stage.codecs import CODECS
from noflush.stage.messages import TensorSpec

CODED = (torch.float32, torch.float16, torch.bfloat16)


def noise_seed(link: int, replica: int, batch: int, micro_batch: int, number: int) -> int:
    """31 bits that name tensor ``number`` of one gradient message."""
    words = struct.pack("<5q", link, replica, batch, micro_batch, number)
    return int.from_bytes(hashlib.blake2b(words, digest_size=4).digest(), "little") >> 1


class Form:
    """How one direction of a link carries the tensors of a micro-batch.

    Args:
        name: the form.
        link: from stage ``link`` to the next.
        replica: data-parallel replica.
        stochastic: whether it rounds stochastically.
    """

    def __init__(self, name: WireName, link: int, replica: int, stochastic: bool) -> None:
        self._name = name
        self._link, self._replica, self._stochastic = link, replica, stochastic
        self._codec = None if name == "model" else CODECS[name]

    def _codes(self, spec: TensorSpec) -> bool:
        if self._codec is None or not spec.differentiable or spec.dtype not in CODED:
            return False
        numbers, width = torch.Size(spec.shape).numel(), spec.dtype.itemsize
        return wire_bytes(self._name, numbers, width) < numbers * width

    def specs(self, specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """What tensors like ``specs`` are on the wire."""
        if self._codec is None:
            return tuple(specs)
        return tuple(self._codec.coded(spec) if self._codes(spec) else spec for spec in specs)

    @torch.no_grad()
    def encode(
        self, tensors: Sequence[Tensor], specs: Sequence[TensorSpec], batch: int, micro_batch: int
    ) -> Sequence[Tensor]:
        """``tensors`` as they travel.

        Args:
            specs: what both ends agreed them to be.
            batch: the batch they belong to, counted over the whole run.
            micro_batch: which one of that batch.
        """
        if self._codec is None:
            return tensors
        coded = []
        for number, (tensor, spec) in enumerate(zip(tensors, specs, strict=True)):
            if self._codes(spec):
                seed = noise_seed(self._link, self._replica, batch, micro_batch, number) if self._stochastic else None
                tensor = self._codec.encode(tensor.detach(), seed)
            coded.append(tensor)
        return coded

    @torch.no_grad()
    def decode(self, tensors: Sequence[Tensor], specs: Sequence[TensorSpec]) -> Sequence[Tensor]:
        """Tensors like ``specs`` from what was received."""
        if self._codec is None:
            return tensors
        return [
            self._codec.decode(tensor, spec) if self._codes(spec) else tensor
            for tensor, spec in zip(tensors, specs, strict=True)
        ]


class LinkForms:
    """Both directions of the link from stage ``link`` to the next, in one replica."""

    def __init__(self, wire: Wire, link: int, replica: int) -> None:
        self.activations = Form(wire.activations, link, replica, stochastic=False)
        self.gradients = Form(wire.gradients, link, replica, stochastic=True)
