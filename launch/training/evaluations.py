"""When a run evaluates, and which samples it takes. Pure."""

from __future__ import annotations

from noflush.launch.arguments.settings import Steps
from noflush.launch.refusal import RefusedError


def evaluates_at(iteration: int, steps: Steps) -> bool:
    """Whether an ``iteration`` that is not the last one is followed by a validation."""
    return iteration % steps.eval_every == 0 and iteration >= (steps.eval_from or 0)


def evaluations_until(iteration: int, every: int, first: int | None) -> int:
    """Validations after iterations up to ``iteration``: after each ``every`` of them, from ``first`` on."""
    return max(0, iteration // every - max(0, (first or 0) - 1) // every)


def evaluated_before(iteration: int, every: int, needed: int, first: int | None = None) -> int:
    """Samples of the evaluations before the one at ``iteration``, each of ``needed``.

    From the iteration alone, so that a resumed run evaluates as one that was not stopped; with ``--skip-train`` it may
    be 0.
    """
    return evaluations_until(max(0, iteration - 1), every, first) * needed


def start_within(samples: int, start: int, needed: int) -> int:
    """``start``, or where ``needed`` samples are left if ``samples`` end before (after a longer --eval-interval).

    Raises RefusedError if there are fewer samples than that.
    """
    if needed > samples:
        raise RefusedError(
            f"an evaluation of --eval-iters global batches needs {needed} samples, and there are {samples}: lower "
            "--eval-iters, or give more validation data"
        )
    return start if start + needed <= samples else start % (samples - needed + 1)
