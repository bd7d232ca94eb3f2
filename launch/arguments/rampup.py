"""How the global batch grows (``--rampup-batch-size``). Pure."""

from __future__ import annotations

from noflush.launch.arguments.settings import Batch


def batch_size_at(batch: Batch, consumed: int) -> int:
    """Global batch size after ``consumed`` samples: linear in them, in whole increments; Megatron's."""
    if batch.rampup is None:
        return batch.global_size
    start, increment, samples = batch.rampup
    if consumed > samples or start == batch.global_size:
        return batch.global_size
    steps = int(consumed / (samples / ((batch.global_size - start) // increment)))
    return min(batch.global_size, start + steps * increment)


def growth(batch: Batch, consumed: int = 0) -> list[tuple[int, int]]:
    """(iterations, samples of each) from ``consumed`` samples on, until the batch has its full size."""
    found = []
    while (size := batch_size_at(batch, consumed)) < batch.global_size:
        count = -(-(_last_of(batch, size, consumed) + 1 - consumed) // size)
        found.append((count, size))
        consumed += count * size
    return found


def _last_of(batch: Batch, size: int, consumed: int) -> int:
    """How many samples, ``consumed`` or more, may be consumed for a batch to be of ``size`` still."""
    assert batch.rampup is not None
    low, high = consumed, batch.rampup[2] + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if batch_size_at(batch, middle) == size else (low, middle)
    return low
