"""How the global batch grows (``--rampup-batch-size``), and how many iterations a number of samples then is. Pure."""

from __future__ import annotations

from noflush.launch.arguments.settings import Batch


def batch_size_at(batch: Batch, consumed: int) -> int:
    """Global batch size after ``consumed`` samples: linear in them, in whole increments."""
    if batch.rampup is None:
        return batch.global_size
    start, increment, samples = batch.rampup
    if consumed > samples or start == batch.global_size:
        return batch.global_size
    steps = int(consumed / (samples / ((batch.global_size - start) // increment)))
    return min(batch.global_size, start + steps * increment)


def iterations_for(batch: Batch, samples: int) -> int:
    """Whole iterations that ``samples`` last for."""
    iterations = consumed = 0
    ramp = batch.rampup[2] if batch.rampup else -1
    while consumed <= ramp and consumed + batch_size_at(batch, consumed) <= samples:
        consumed += batch_size_at(batch, consumed)
        iterations += 1
    return iterations + (samples - consumed) // batch.global_size if consumed > ramp else iterations
