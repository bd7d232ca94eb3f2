"""Kernels ``torch`` and ``compile``: the reference arithmetic, with its scalars computed by the host.

The host reads the gradient norm to do so. On a CPU that costs nothing; on a GPU it is a synchronisation a step,
which is why ``auto`` prefers Triton there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from noflush.kernels.flat import Flat, Outcome
from noflush.kernels.norm import gradient_norm
from noflush.kernels.reference import RULES
from noflush.kernels.scalars import COEFFICIENTS, Coefficients, RuleName, momentum

# Elements. Every operation of the rule then finds its operands in the cache; a third faster than whole tensors.
_CHUNK = 1 << 17


class HostKernel:
    """Runs `reference` eagerly, in chunks that fit a CPU's cache."""

    name = "torch"

    def clock_device(self, device: torch.device) -> torch.device:
        """Where clocks live: with the host, which computes from them."""
        return torch.device("cpu")

    def tune(self, gradients: Sequence[Tensor]) -> str | None:
        """Nothing to settle."""
        return None

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """2-norm of all gradients together: 0-dim float32 on their device; inf or nan if any element is."""
        return gradient_norm(gradients)

    def update(
        self,
        rule: RuleName,
        flats: Sequence[Flat],
        norm: Tensor,
        max_norm: float,
        scale: Tensor | float,
        zero: bool = True,
    ) -> Outcome:
        """As `flat.Kernel.update`; reads the norm."""
        scale = float(scale)
        unscaled = norm / scale
        finite = math.isfinite(unscaled.item())
        factor = 1.0
        if max_norm > 0:  # torch.nn.utils.clip_grad_norm_'s own formula
            factor = torch.clamp(max_norm / (unscaled + 1e-6), max=1.0).item()
        for flat in flats:
            if not finite:
                _carry_over(flat, zero)
                continue
            flat.clock[0] += 1
            step = flat.clock[0].item()
            flat.clock[1] *= momentum(flat.hyper, step)
            c = COEFFICIENTS[rule](flat.hyper, step, flat.clock[1].item(), factor / scale)
            self._run(rule, flat, c, zero, int(step))
        return Outcome(unscaled.float(), torch.full_like(unscaled, 0.0 if finite else 1.0))

    def _run(self, rule: RuleName, flat: Flat, c: Coefficients, zero: bool, seed: int) -> None:
        n = flat.gradient.numel()
        chunk = _CHUNK if flat.gradient.device.type == "cpu" else max(n, 1)
        for first in range(0, n, chunk):
            part = slice(first, first + chunk)
            RULES[rule](
                flat.gradient[part],
                flat.weights[part],
                flat.target[part],
                tuple(s[part] for s in flat.state),
                c,
                flat.master,
                zero,
                seed,
                first,
            )


class CompiledKernel(HostKernel):
    """Runs `reference` through `torch.compile`: one fused loop, compiled once for all lengths (5 to 25 s)."""

    name = "compile"

    def __init__(self) -> None:
        # Dynamic: a length a stage and group must not compile anew; 0-dim tensors: nor must a learning rate.
        self._rules = {name: torch.compile(rule, dynamic=True, fullgraph=True) for name, rule in RULES.items()}

    def _run(self, rule: RuleName, flat: Flat, c: Coefficients, zero: bool, seed: int) -> None:
        device = flat.gradient.device
        tensors = Coefficients(*(torch.tensor(x, dtype=torch.float32, device=device) for x in c))
        self._rules[rule](
            flat.gradient,
            flat.weights,
            flat.target,
            flat.state,
            tensors,
            flat.master,
            zero,
            torch.tensor(seed, device=device),
        )


def _carry_over(flat: Flat, zero: bool) -> None:
    """The next version of a skipped update: the same weights; their state and clock stay."""
    flat.target.copy_(flat.weights)
    if zero:
        flat.gradient.zero_()
