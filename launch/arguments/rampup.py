"""How the global batch changes (``--rampup-batch-size``, ``--step-batch-size-schedule``). Pure."""

from __future__ import annotations

from noflush.launch.arguments.settings import Batch

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def batch_size_at(batch: Batch, consumed: int) -> int:
    """Global batch size after ``consumed`` samples, as Megatron has it.

    A ramp is linear in them, in whole increments; a schedule's sizes are from their samples on.
    """
    if batch.schedule:
        return next(size for first, size in reversed(batch.schedule) if consumed >= first)
    if batch.rampup is None:
        return batch.global_size
    start, increment, samples = batch.rampup
    if consumed > samples or start == batch.global_size:
        return batch.global_size
    steps = int(consumed / (samples / ((batch.global_size - start) // increment)))
    return min(batch.global_size, start + steps * increment)


def growth(batch: Batch, consumed: int = 0) -> list[tuple[int, int]]:
    """(iterations, samples of each) from ``consumed`` samples on, until the batch has its last size."""
    found = []
    while (last := _last_before_another(batch, consumed)) is not None:
        size = batch_size_at(batch, consumed)
        count = -(-(last + 1 - consumed) // size)
        found.append((count, size))
        consumed += count * size
    return found


def read_schedule(text: str, sequence: int) -> tuple[tuple[int, int], ...]:
    """(samples, size of the global batch from there on) of ``"0:16 2.4B:320"``, whose thresholds are tokens.

    Args:
        text: ``THRESHOLD:SIZE``, any number of them, by spaces or commas; K, M, B and T stand for 1e3 to 1e12.
        sequence: tokens of a sample.

    Raises ValueError saying what is wrong.
    """
    found = []
    for entry in text.replace(",", " ").split():
        threshold, _, size = entry.partition(":")
        try:
            found.append((_number(threshold) // sequence, _number(size)))
        except (ValueError, OverflowError):
            raise ValueError(f"{entry} is not THRESHOLD:SIZE, as in 2.4B:320") from None
    found.sort()
    thresholds = [threshold for threshold, _ in found]
    if not found or thresholds[0] != 0:
        raise ValueError("the first threshold must be 0")
    if len(set(thresholds)) < len(found):
        raise ValueError(f"two thresholds are in the same sample of {sequence} tokens")
    return tuple(found)


def _number(word: str) -> int:
    suffix = word[-1:].upper()
    return int(float(word[:-1]) * _SUFFIXES[suffix]) if suffix in _SUFFIXES else int(float(word))


def _last_before_another(batch: Batch, consumed: int) -> int | None:
    """How many samples, ``consumed`` or more, may be consumed before the size changes; None if it does no more."""
    if batch.schedule:
        return next((first - 1 for first, _ in batch.schedule if first > consumed), None)
    size = batch_size_at(batch, consumed)
    if batch.rampup is None or size == batch.global_size:
        return None
    low, high = consumed, batch.rampup[2] + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if batch_size_at(batch, middle) == size else (low, middle)
    return low
