"""Numbers that several methods share. Pure: no torch. Their twins for Triton are in `device`."""

from __future__ import annotations

from typing import Any

from noflush.methods.table import STAGE_MOMENTUM


def learning_rate(lr: float, discount_steps: float, delay: float, step: float) -> float:
    """Eq 13 of arXiv 2505.01099: lr / max(1, delay)^rho at update ``step`` (from 1); ``discount_steps`` C = 0: lr.

    rho = 1 - step / C, as in the authors' released code: the first update has rho below 1 already, number C has 0.
    """
    if not discount_steps or delay <= 1:
        return lr
    rho = 1.0 - min(step / discount_steps, 1.0)
    return lr / float(delay**rho)


def stage_momentum(asked_for: Any, base: float, stage: int, stages: int) -> float:
    """Eq 13: gamma_i = base + (P - i) / P (0.99 - base) for 1-indexed stage i (base 0.9 there), if asked for."""
    if not asked_for:
        return base
    return base + (stages - 1 - stage) / stages * (STAGE_MOMENTUM - base)
