"""Kernels ``torch`` and ``compile``: a method's own arithmetic, with its scalars computed on the CPU.

The CPU reads the gradient norm to do so. Where it computes itself that costs nothing; with a GPU it is a
synchronisation an update, which is why ``auto`` prefers Triton there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from noflush.kernels.norm import gradient_norm
from noflush.methods.elementwise import look
from noflush.methods.flat import Flat, Outcome

# Elements. Every operation of the rule then finds its operands in the cache; a third faster than whole tensors.
_CHUNK = 1 << 17


class EagerKernel:
    """Runs a method's rule eagerly, in chunks that fit a CPU's cache."""

    name = "torch"

    def clock_device(self, device: torch.device) -> torch.device:
        """Where clocks live: with the CPU, which computes from them."""
        return torch.device("cpu")

    def tune(self, gradients: Sequence[Tensor]) -> str | None:
        """Nothing to settle."""
        return None

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """2-norm of all gradients together: 0-dim float32 on their device; inf or nan if any element is."""
        return gradient_norm(gradients)

    def update(
        self, flats: Sequence[Flat], norm: Tensor, max_norm: float, scale: Tensor | float, whole: float = 0.0
    ) -> Outcome:
        """As `flat.Kernel.update`; reads the norm."""
        scale = float(scale)
        unscaled = norm / scale
        finite = math.isfinite(unscaled.item())
        factor = 1.0
        if max_norm > 0:  # torch.nn.utils.clip_grad_norm_'s own formula
            factor = torch.clamp(max_norm / (unscaled.clamp(min=whole) + 1e-6), max=1.0).item()
        for flat in flats:
            if not finite:
                _carry_over(flat)
                continue
            flat.clock[0] += 1
            step = flat.clock[0].item()
            if flat.method.factor is not None:
                flat.clock[1] *= flat.method.factor(flat.hyper, step)
            c = flat.method.coefficients(flat.hyper, step, flat.clock[1].item(), factor / scale)
            if flat.method.row.unit == "matrix":
                run_on_matrices(flat, c, int(step))
            else:
                self._run(flat, c, int(step))
        return Outcome(unscaled.float(), torch.full_like(unscaled, 0.0 if finite else 1.0))

    def _run(self, flat: Flat, c: Any, seed: int) -> None:
        n = flat.gradient.numel()
        chunk = _CHUNK if flat.gradient.device.type == "cpu" else max(n, 1)
        for first in range(0, n, chunk):
            part = slice(first, first + chunk)
            rule = _ahead(flat.method.rule, flat.ahead) if flat.ahead else flat.method.rule
            rule(
                flat.gradient[part],
                flat.weights[part],
                flat.target[part],
                tuple(s[part] for s in flat.state),
                c,
                flat.master,
                seed,
                first,
            )
            flat.gradient[part].zero_()


class CompiledKernel(EagerKernel):
    """Runs element-wise rules through `torch.compile`: one fused loop, compiled once for all lengths (5 to 25 s)."""

    name = "compile"

    def __init__(self) -> None:
        self._compiled: dict[tuple[str, bool], Callable[..., None]] = {}

    def _run(self, flat: Flat, c: Any, seed: int) -> None:
        device = flat.gradient.device
        name, wrapped = (flat.method.name, bool(flat.ahead)), _clearing_ahead if flat.ahead else _clearing
        if name not in self._compiled:
            # Dynamic: a length a stage and group must not compile anew; 0-dim tensors: nor must a learning rate.
            self._compiled[name] = torch.compile(wrapped(flat.method.rule), dynamic=True, fullgraph=True)
        tensors = type(c)(*(torch.tensor(x, dtype=torch.float32, device=device) for x in c))
        self._compiled[name](
            *((torch.tensor(flat.ahead, device=device),) if flat.ahead else ()),
            flat.gradient,
            flat.weights,
            flat.target,
            flat.state,
            tensors,
            flat.master,
            torch.tensor(seed, device=device),
        )


def _ahead(rule: Callable[..., None], ahead: Any) -> Callable[..., None]:
    """An element-wise ``rule`` with its look-ahead."""

    def looking(gradient: Tensor, weights: Tensor, target: Tensor, *rest: Any) -> None:
        before = weights.clone()
        rule(gradient, weights, target, *rest)
        look(weights, before, target, ahead)

    return looking


# torch.compile counts its graphs by a function's code, so what looks ahead has a code of its own.


def _clearing(rule: Callable[..., None]) -> Callable[..., None]:
    def clearing(gradient: Tensor, *rest: Any) -> None:
        rule(gradient, *rest)
        gradient.zero_()

    return clearing


def _clearing_ahead(rule: Callable[..., None]) -> Callable[..., None]:
    def clearing(ahead: Tensor, gradient: Tensor, weights: Tensor, target: Tensor, *rest: Any) -> None:
        before = weights.clone()
        rule(gradient, weights, target, *rest)
        look(weights, before, target, ahead)
        gradient.zero_()

    return clearing


def run_on_matrices(flat: Flat, c: Any, seed: int) -> None:
    """A method's rule on the matrices of a flat group, all at once, for it to batch those of equal shape."""

    def views(of: Tensor) -> list[Tensor]:
        return [matrix.of(of) for matrix in flat.matrices]

    states = [tuple(place.of(t) for place, t in zip(places, flat.state, strict=True)) for places in flat.state_places]
    weights, targets = views(flat.weights), views(flat.target)
    before = [w.clone() for w in weights] if flat.ahead else []
    sliced = [matrix.sliced for matrix in flat.matrices]
    flat.method.rule(views(flat.gradient), weights, targets, states, sliced, c, flat.master, seed)
    for w, w_before, target in zip(weights, before, targets, strict=False):
        look(w, w_before, target, flat.ahead)
    flat.gradient.zero_()


def _carry_over(flat: Flat) -> None:
    """The next version of a skipped update: the same weights; their state and clock stay."""
    flat.target.copy_(flat.weights)
    flat.gradient.zero_()
