"""How evenly a run's compute lies on its stages, in one line: the slowest sets the pace of all. Pure."""

from __future__ import annotations

from collections.abc import Sequence

CALLS = 50
"""After so many calls it is said, once."""
_EVEN = 1.1


def balance_line(busy_ms: Sequence[float]) -> str:
    """What there is to say of ``busy_ms``, every stage's milliseconds of compute in a call, and what to do about it."""
    mean, slowest = sum(busy_ms) / len(busy_ms), max(range(len(busy_ms)), key=busy_ms.__getitem__)
    by_stage = " ".join(f"{ms:.1f}" for ms in busy_ms)
    line = f"compute of a call by stage (ms): {by_stage}"
    if not mean or busy_ms[slowest] <= _EVEN * mean:
        return f"{line}; even"
    return (
        f"{line}; stage {slowest} sets the pace of all, at {busy_ms[slowest] / mean:.2f} times the mean: give it fewer "
        "layers (partition_method of the PipelineModule; Megatron's --pipeline-model-parallel-layout)"
    )
