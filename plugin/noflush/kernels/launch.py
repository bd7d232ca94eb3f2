"""Kernel ``triton``: launches `fused`, keeps its small device tensors, and never waits for the device.

Methods of matrices run in torch beside it: without waiting too where the method says how an update is skipped
(`Method.still`), else they read the norm first, which is a synchronisation an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from noflush.kernels import fused
from noflush.kernels.eager import EagerKernel, run_on_matrices
from noflush.kernels.norm import apex_norm
from noflush.methods.flat import Flat, Outcome
from noflush.methods.method import Fused

BLOCK = 1024  # 8 elements a thread: one 128-bit access in bfloat16, two in float32
NORM_BLOCK = 4096
_NORM_PROGRAMS = 1024
_OUTCOMES = 8


@dataclass
class _Numbers:
    """Small device tensors of groups of one method, and the hyper-parameters that are there."""

    values: list[tuple[float, ...]]
    hyper: Tensor
    numbers: Tensor


class TritonKernel:
    """One pass a flat, one launch a parameter group.

    Args:
        device: the GPU, or a CPU under Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
    """

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numbers: dict[str, _Numbers] = {}
        self._plain = EagerKernel()
        self._limit, self._limit_value = torch.zeros(1, device=device), 0.0
        self._whole, self._whole_value = torch.zeros(1, device=device), 0.0
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
        programs = [max(1, min(_NORM_PROGRAMS, -(-g.numel() // NORM_BLOCK))) for g in gradients]
        if self._partials.numel() < sum(programs):
            self._partials = torch.zeros(sum(programs), device=self._device)
        first = 0
        for gradient, count in zip(gradients, programs, strict=True):
            fused.sum_of_squares[(count,)](
                gradient, self._partials[first:], gradient.numel(), BLOCK=NORM_BLOCK, num_warps=8
            )
            first += count
        fused.finish_norm[(1,)](self._partials, self._norm, first, BLOCK=1024)
        return self._norm.reshape(())

    def update(
        self, flats: Sequence[Flat], norm: Tensor, max_norm: float, scale: Tensor | float, whole: float = 0.0
    ) -> Outcome:
        """As `flat.Kernel.update`, without reading anything back.

        The outcome's tensors are overwritten eight updates later.
        """
        if not flats:  # a stage without a weight to learn
            return Outcome(norm, torch.zeros_like(norm))
        self._bring(max_norm, scale, whole)
        outcome = self._outcomes[self._updates % _OUTCOMES]
        self._updates += 1
        found = Outcome(outcome[0], outcome[1])
        for fused_rule, members in groupby(flats, key=lambda flat: flat.method.fused):
            group = list(members)
            if fused_rule is not None:
                self._launch(fused_rule, group, norm, outcome)
            elif all(flat.method.still is not None for flat in group):
                self._on_matrices(group, norm, max_norm, whole, outcome)
            else:
                found = self._in_torch(group, norm, max_norm, scale, whole)
        return found

    def _on_matrices(self, flats: Sequence[Flat], norm: Tensor, max_norm: float, whole: float, outcome: Tensor) -> None:
        """Methods of matrices that can be told not to move: the device decides whether they do."""
        scale = self._scale[0]
        unscaled = norm / scale
        finite = torch.isfinite(unscaled)
        clip = torch.ones_like(unscaled)
        if max_norm > 0:
            clip = torch.clamp(max_norm / (unscaled.clamp(min=whole) + 1e-6), max=1.0)
        factor = torch.where(finite, clip / scale, 0.0)
        for flat in flats:
            assert flat.method.still is not None
            flat.clock[0] += finite
            flat.gradient.nan_to_num_(0.0, 0.0, 0.0)  # of no effect but in an update that is skipped
            moving = flat.method.coefficients(flat.hyper, 1.0, 1.0, factor)
            chosen = [
                a if a is b or a == b else torch.where(finite, a, b)
                for a, b in zip(moving, flat.method.still(moving), strict=True)
            ]
            run_on_matrices(flat, type(moving)(*chosen), 0)
        outcome[0], outcome[1] = unscaled, (~finite).float()

    def _launch(self, rule: Fused, flats: Sequence[Flat], norm: Tensor, outcome: Tensor) -> None:
        """Groups of one method, whose clocks lie one after the other."""
        first = flats[0].clock
        assert all(f.clock.data_ptr() == first.data_ptr() + 8 * i for i, f in enumerate(flats)), "clocks lie apart"
        hyper, numbers = self._upload(rule, flats)
        fused.prepare[(len(flats),)](
            hyper,
            first,
            norm,
            self._scale,
            numbers,
            outcome,
            self._limit,
            self._whole,
            FACTOR=rule.factor,
            COEFFICIENTS=rule.coefficients,
            HYPERS=hyper.shape[1],
            WORDS=numbers.shape[1],
        )
        for flat, row in zip(flats, numbers, strict=True):
            n = flat.gradient.numel()
            if n == 0:
                continue
            fused.step[(-(-n // BLOCK),)](
                flat.gradient,
                flat.weights,
                flat.target,
                flat.state[0],
                flat.state[-1],
                row,
                flat.ahead,
                n,
                RULE=rule.rule,
                STATES=len(flat.state),
                MASTER=flat.master,
                LOOKS=bool(flat.ahead),
                ROUND=flat.state[0].dtype == torch.bfloat16,
                BLOCK=BLOCK,
                num_warps=4,
            )

    def _in_torch(
        self, flats: Sequence[Flat], norm: Tensor, max_norm: float, scale: Tensor | float, whole: float
    ) -> Outcome:
        on_cpu = [flat.clock.cpu() for flat in flats]
        copies = [replace(flat, clock=clock) for flat, clock in zip(flats, on_cpu, strict=True)]
        outcome = self._plain.update(copies, norm, max_norm, scale, whole)
        for flat, clock in zip(flats, on_cpu, strict=True):
            flat.clock.copy_(clock)
        return outcome

    def _upload(self, rule: Fused, flats: Sequence[Flat]) -> tuple[Tensor, Tensor]:
        """Brings the hyper-parameters that changed since the last update to the device; with room for the numbers."""
        values = [tuple(f.hyper) for f in flats]
        name = f"{flats[0].method.name} of {flats[0].clock.data_ptr()}"
        kept = self._numbers.get(name)
        if kept is None or len(kept.values) != len(values):
            kept = self._numbers[name] = _Numbers(
                [],
                torch.zeros((len(flats), len(values[0])), dtype=torch.float64, device=self._device),
                torch.zeros((len(flats), fused.COMMON + rule.words), device=self._device),
            )
        if values != kept.values:
            kept.hyper.copy_(self._staged(torch.tensor(values, dtype=torch.float64)), non_blocking=True)
            kept.values = values
        return kept.hyper, kept.numbers

    def _bring(self, max_norm: float, scale: Tensor | float, whole: float) -> None:
        """Brings clip limit, loss scale and the larger norm to the device where they changed."""
        if max_norm != self._limit_value:
            self._limit.fill_(max_norm)
            self._limit_value = max_norm
        if whole != self._whole_value:
            self._whole.fill_(whole)
            self._whole_value = whole
        if isinstance(scale, Tensor):
            self._scale.copy_(scale.reshape(1), non_blocking=True)
            self._scale_value = math.nan
        elif scale != self._scale_value:
            self._scale.fill_(scale)
            self._scale_value = scale

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
