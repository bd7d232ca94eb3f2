"""What an update sees: flat tensors that know the matrices in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from noflush.methods.matrices import Part, Piece, piece_of
from noflush.methods.method import Method


@dataclass(frozen=True)
class FlatGroup:
    """Where some parameters of one group lie in a flat tensor of ``numel`` elements.

    Attributes:
        group: number of the optimizer's parameter group (its dict is replaced when a checkpoint is loaded).
        params: as the optimizer knows them: the parameters, or one tensor that is this rank's shard of them.
        offsets: of each one's first element.
        numel: length of the flat tensor, gaps and padding included.
        pieces: the model's parameters in it; None: some are cut in two by the shard's ends.
    """

    group: int
    params: tuple[Tensor, ...]
    offsets: tuple[int, ...]
    numel: int
    pieces: tuple[Piece, ...] | None

    @property
    def by_parameter(self) -> bool:
        """Whether the optimizer knows the model's parameters one by one, and not a shard of them."""
        return self.pieces is not None and [p.shape for p in self.pieces] == [tuple(p.shape) for p in self.params]

    @classmethod
    def of(cls, group: int, params: Sequence[Tensor], offsets: Sequence[int], numel: int) -> FlatGroup:
        """Of whole parameters."""
        pieces = tuple(piece_of(p, offset) for p, offset in zip(params, offsets, strict=True))
        return cls(group, tuple(params), tuple(offsets), numel, pieces)


@dataclass(frozen=True)
class Flat:
    """Flat tensors of one parameter group: 1-dim, one length n, one device; any length and alignment.

    Attributes:
        method: the rule.
        gradient: float32, bfloat16 or float16.
        weights: float32; read, and with ``master`` updated in place.
        target: where the next weight version goes: the model's dtype with ``master``, else float32.
        state: the method's flat state, in the row's order: of elements float32 or bfloat16 [n]; of matrices as long as
            their shapes make it.
        clock: float32 [2], (updates made, running product); on the kernel's own device.
        hyper: the method's hyper-parameters now.
        master: whether the weights are kept apart from the next version, which is made out of them.
        matrices: for a method of matrices: where they lie.
        state_places: for a method of matrices: where each one's state lies, a tuple in the row's order for each.
        ahead: how many times this update's own step the next version lies beyond the weights (`look_ahead.steps`); with
            any, the weights are kept apart.
    """

    method: Method
    gradient: Tensor
    weights: Tensor
    target: Tensor
    state: tuple[Tensor, ...]
    clock: Tensor
    hyper: Any
    master: bool
    matrices: tuple[Piece | Part, ...] = ()
    state_places: tuple[tuple[Piece | Part, ...], ...] = ()
    ahead: float = 0.0


class Outcome(NamedTuple):
    """What came of an update; both 0-dim float32, on the gradients' device, so that reading them can wait.

    Attributes:
        norm: gradient norm, unscaled, before clipping.
        skipped: 1.0 if it was not finite and nothing but the version number moved, else 0.0.
    """

    norm: Tensor
    skipped: Tensor


class Kernel(Protocol):
    """What computes updates: `eager.EagerKernel`, `eager.CompiledKernel` or `launch.TritonKernel`."""

    name: str

    def clock_device(self, device: torch.device) -> torch.device:
        """Where the clocks of flats on ``device`` live."""

    def tune(self, gradients: Sequence[Tensor]) -> str | None:
        """Before training: settles what is best measured on the gradients themselves; a line about it, or None."""

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """2-norm of all gradients together: 0-dim float32 on their device; inf or nan if any element is."""

    def update(
        self, flats: Sequence[Flat], norm: Tensor, max_norm: float, scale: Tensor | float, whole: float = 0.0
    ) -> Outcome:
        """One update of all flats, or none; clears the gradients.

        Args:
            flats: what to update, and how; their clocks move on.
            norm: of the scaled gradients, from `norm`, over all shards.
            max_norm: clips the unscaled norm to so much; 0 clips nothing.
            scale: loss scale the gradients carry; a number, or a tensor of one element.
            whole: clips as if the unscaled norm were at least so much.
        """
