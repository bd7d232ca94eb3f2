"""Kernel ``triton``: launches `fused`, keeps its small device tensors, and never waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from noflush.kernels import fused
from noflush.kernels.flat import Flat, Outcome
from noflush.kernels.norm import apex_norm
from noflush.kernels.scalars import Hyper, RuleName

_RULES = {"nadamw": fused.NADAMW, "adamw": fused.ADAMW, "nag": fused.NAG}
_HYPERS = len(fields(Hyper))
_BLOCK = 1024  # 8 elements a thread: one 128-bit access in bfloat16, two in float32
_NORM_BLOCK = 4096
_NORM_PROGRAMS = 1024
_OUTCOMES = 8


class TritonKernel:
    """One pass a flat, one launch a parameter group.

    Args:
        device: the GPU, or a CPU under Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
    """

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._hyper: Tensor | None = None
        self._hyper_values: list[tuple[float, ...]] = []
        self._coefficients: Tensor | None = None
        self._limit, self._limit_value = torch.zeros(1, device=device), 0.0
        self._scale, self._scale_value = torch.ones(1, device=device), 1.0
        self._outcomes = torch.zeros((_OUTCOMES, 2), device=device)
        self._updates = 0
        self._partials = torch.zeros(0, device=device)
        self._norm = torch.zeros(1, device=device)
        self._foreign_norm: Callable[[Sequence[Tensor]], Tensor] | None = None

    def clock_device(self, device: torch.device) -> torch.device:
        """Where clocks live: on the device, which moves them on."""
        return self._device

    def tune(self, gradients: Sequence[Tensor]) -> str | None:
        """Times apex's norm against ours on ``gradients`` and keeps the faster; a line of what was found, or None.

        Waits for the device, so: before training.
        """
        other = apex_norm() if self._device.type == "cuda" else None
        if other is None or not gradients:
            return None
        ours_ms, theirs_ms = _milliseconds(self.norm, gradients), _milliseconds(other, gradients)
        self._foreign_norm = other if theirs_ms < ours_ms else None
        return f"norm by {'apex' if self._foreign_norm else 'Triton'} ({ours_ms:.3f} ms; apex {theirs_ms:.3f} ms)"

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """2-norm of all gradients together: 0-dim float32 on the device; inf or nan if any element is."""
        if self._foreign_norm is not None:
            return self._foreign_norm(gradients)
        if not gradients:
            return self._norm.zero_().reshape(())
        programs = [max(1, min(_NORM_PROGRAMS, -(-g.numel() // _NORM_BLOCK))) for g in gradients]
        if self._partials.numel() < sum(programs):
            self._partials = torch.zeros(sum(programs), device=self._device)
        first = 0
        for gradient, count in zip(gradients, programs, strict=True):
            fused.sum_of_squares[(count,)](
                gradient, self._partials[first:], gradient.numel(), BLOCK=_NORM_BLOCK, num_warps=8
            )
            first += count
        fused.finish_norm[(1,)](self._partials, self._norm, first, BLOCK=1024)
        return self._norm.reshape(())

    def update(
        self,
        rule: RuleName,
        flats: Sequence[Flat],
        norm: Tensor,
        max_norm: float,
        scale: Tensor | float,
        zero: bool = True,
    ) -> Outcome:
        """As `host.HostKernel.update`, without reading anything back.

        The outcome's tensors are overwritten eight updates later.
        """
        if not flats:  # a stage without a weight to learn
            return Outcome(norm, torch.zeros_like(norm))
        hyper, coefficients = self._upload(flats, max_norm, scale)
        outcome = self._outcomes[self._updates % _OUTCOMES]
        self._updates += 1
        fused.prepare[(len(flats),)](
            hyper,
            flats[0].clock,
            norm,
            self._scale,
            coefficients,
            outcome,
            self._limit,
            RULE=_RULES[rule],
            HYPERS=_HYPERS,
            WORDS=fused.WORDS,
        )
        for flat, row in zip(flats, coefficients, strict=True):
            n = flat.gradient.numel()
            if n == 0:
                continue
            fused.step[(-(-n // _BLOCK),)](
                flat.gradient,
                flat.weights,
                flat.target,
                flat.state[0],
                flat.state[-1],
                row,
                n,
                RULE=_RULES[rule],
                MASTER=flat.master,
                ZERO=zero,
                ROUND=rule != "nag" and flat.state[0].dtype == torch.bfloat16,
                BLOCK=_BLOCK,
                num_warps=4,
            )
        return Outcome(outcome[0], outcome[1])

    def _upload(self, flats: Sequence[Flat], max_norm: float, scale: Tensor | float) -> tuple[Tensor, Tensor]:
        """Brings the numbers that changed since the last update to the device."""
        first = flats[0].clock
        assert all(f.clock.data_ptr() == first.data_ptr() + 8 * i for i, f in enumerate(flats)), "clocks lie apart"
        values = [f.hyper.words() for f in flats]
        if self._hyper is None or self._coefficients is None or len(values) != len(self._hyper_values):
            self._hyper = torch.zeros((len(flats), _HYPERS), dtype=torch.float64, device=self._device)
            self._coefficients = torch.zeros((len(flats), fused.WORDS), device=self._device)
        if values != self._hyper_values:
            self._hyper.copy_(self._staged(torch.tensor(values, dtype=torch.float64)), non_blocking=True)
            self._hyper_values = values
        if max_norm != self._limit_value:
            self._limit.fill_(max_norm)
            self._limit_value = max_norm
        if isinstance(scale, Tensor):
            self._scale.copy_(scale.reshape(1), non_blocking=True)
            self._scale_value = math.nan
        elif scale != self._scale_value:
            self._scale.fill_(scale)
            self._scale_value = scale
        return self._hyper, self._coefficients

    def _staged(self, values: Tensor) -> Tensor:
        # From pinned memory a copy does not wait; torch keeps the block until the copy has read it.
        return values.pin_memory() if self._device.type == "cuda" else values


def _milliseconds(norm: Callable[[Sequence[Tensor]], Tensor], gradients: Sequence[Tensor], repeats: int = 5) -> float:
    """Median time of ``norm`` on a GPU."""
    norm(gradients)
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        norm(gradients)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]
