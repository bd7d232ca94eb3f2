"""What one launch of the update works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from noflush.kernels.scalars import Hyper, RuleName


@dataclass(frozen=True)
class Flat:
    """Flat tensors of one parameter group: 1-dim, one length n, one device; any length and alignment.

    Attributes:
        gradient: float32, bfloat16 or float16.
        weights: float32; read, and with ``master`` updated in place.
        target: where the next weight version goes: the model's dtype with ``master``, else float32.
        state: the rule's flat state, (exp_avg, exp_avg_sq) float32 or bfloat16, or (weight,) float32.
        clock: float32 [2], (updates made, product of NAdam's mu); on the kernel's own device.
        hyper: hyper-parameters now.
        master: whether the weights are a float32 master of a lower-precision model.
    """

    gradient: Tensor
    weights: Tensor
    target: Tensor
    state: tuple[Tensor, ...]
    clock: Tensor
    hyper: Hyper
    master: bool


class Outcome(NamedTuple):
    """What came of an update; both 0-dim float32, on the gradients' device, so that reading them can wait.

    Attributes:
        norm: gradient norm, unscaled, before clipping.
        skipped: 1.0 if it was not finite and nothing but the version number moved, else 0.0.
    """

    norm: Tensor
    skipped: Tensor


class Kernel(Protocol):
    """What computes updates: `host.HostKernel`, `host.CompiledKernel` or `device.TritonKernel`."""

    name: str

    def clock_device(self, device: torch.device) -> torch.device:
        """Where the clocks of flats on ``device`` live."""

    def tune(self, gradients: Sequence[Tensor]) -> str | None:
        """Before training: settles what is best measured on the gradients themselves; a line about it, or None."""

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """2-norm of all gradients together: 0-dim float32 on their device; inf or nan if any element is."""

    def update(
        self,
        rule: RuleName,
        flats: Sequence[Flat],
        norm: Tensor,
        max_norm: float,
        scale: Tensor | float,
        zero: bool = True,
    ) -> Outcome:
        """One update of all flats, or none.

        Args:
            rule: which.
            flats: what to update; their clocks move on.
            norm: of the scaled gradients, from `norm`, over all shards.
            max_norm: clips the unscaled norm to so much; 0 clips nothing.
            scale: loss scale the gradients carry; a number, or a tensor of one element.
            zero: whether to clear the gradients.
        """
