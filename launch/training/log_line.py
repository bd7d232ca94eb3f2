"""The line that Megatron prints of a run's progress, and what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from noflush.launch.arguments.progress import Position
from noflush.stage.messages import StageFigures


@dataclass(frozen=True)
class Interval:
    """Means and sums over the iterations since the last line.

    Attributes:
        seconds: an iteration took on average.
        loss: mean over the finite ones; nan if there were none.
        norm: gradient norm over all stages, of the newest batch of which all have told; None before any.
        skipped, nans: batches that some stage skipped, which one overflow may make several; iterations whose loss was
            not finite.
        bubble: share of the time in which stages did not compute, over all of them; None where nobody measures it.
        delay: of the first stage, in updates.
    """

    seconds: float
    learning_rate: float
    batch_size: int
    loss: float
    scale: float
    norm: float | None
    skipped: int
    nans: int
    bubble: float | None
    delay: int
    teraflops: float | None = None


def log_line(position: Position, iterations: int, interval: Interval, now: datetime) -> str:
    """Megatron's line, and behind it the bubble and the delay."""
    words = [
        f" [{now:%Y-%m-%d %H:%M:%S}] iteration {position.iteration:8d}/{iterations:8d}",
        f"consumed samples: {position.consumed:12d}",
        f"elapsed time per iteration (ms): {1000 * interval.seconds:.1f}",
    ]
    if interval.teraflops is not None:
        words.append(f"throughput per GPU (TFLOP/s/GPU): {interval.teraflops:.1f}")
    words += [
        f"learning rate: {interval.learning_rate:.6E}",
        f"global batch size: {interval.batch_size:5d}",
        f"lm loss: {interval.loss:.6E}",
        f"loss scale: {interval.scale:.1f}",
    ]
    if interval.norm is not None:
        words.append(f"grad norm: {interval.norm:.3f}")
    words += [
        f"number of skipped iterations: {interval.skipped:3d}",
        f"number of nan iterations: {interval.nans:3d}",
    ]
    if interval.bubble is not None:
        words.append(f"bubble: {100 * interval.bubble:.1f}%")
    words.append(f"delay: {interval.delay}")
    return " | ".join(words) + " |"


def bubble_between(before: Sequence[StageFigures], now: Sequence[StageFigures]) -> float | None:
    """Share of the stages' time in `train_batch` without compute, between two sets of their figures."""
    if not before:
        before = [StageFigures(0, 0)] * len(now)
    spent = sum(b.spent_ns - a.spent_ns for a, b in zip(before, now, strict=True))
    busy = sum(b.busy_ns - a.busy_ns for a, b in zip(before, now, strict=True))
    return 1 - busy / spent if spent > 0 else None


def floating_point_operations(layers: int, hidden: int, sequence: int, parameters: int) -> float:
    """Of forward and backward of one sample: 6 a weight and token, and causal attention's scores and sums."""
    return 6.0 * sequence * parameters + 6.0 * layers * hidden * sequence * sequence
