"""Runs walked iteration by iteration, batch sizes as Megatron counts them, rates by its scheduler: the oracle."""

from __future__ import annotations

import pytest
import torch

from noflush.launch.arguments.progress import Position
from noflush.launch.arguments.understand import understand
from noflush.launch.training.beside_weights import write_position
from noflush.launch.training.learning_rate import rates_of
from noflush.stage.checkpoint import write_latest

MAX, MIN = 1e-3, 1e-4
RUN = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8 "
    "--micro-batch-size 2 --pipeline-model-parallel-size 2 --mock-data --tokenizer-type NullTokenizer --vocab-size 60 "
    f"--untie-embeddings-and-output-weights --lr {MAX} --min-lr {MIN} "
)
RAMP = "--global-batch-size 16 --rampup-batch-size 4 4 64 "
STEPS = ("--step-batch-size-schedule", "0:4 160:12, 0.4K:16")  # tokens, 8 a sample


def understood(arguments, more=()):
    return understand([*(RUN + arguments).split(), *more], 2)[0]


def size_by_megatron(batch, consumed):
    """By megatron-core's own calculators: ramps are those of releases before 0.19, schedules those of later ones.

    Where the installed one has none, by the rule of their documents, step by step.
    """
    from megatron.core import num_microbatches_calculator as calculators

    if batch.schedule:
        kind = "StepBatchsizeNumMicroBatchesCalculator"
        by_hand = [size for at, size in batch.schedule if at <= consumed]
        given = (1, 1, False, 1, " ".join(f"{at}:{size}" for at, size in batch.schedule))
    elif batch.rampup:
        start, increment, samples = batch.rampup
        kind = "RampupBatchsizeNumMicroBatchesCalculator"
        steps = (batch.global_size - start) // increment
        by_hand = [start + n * increment for n in range(steps + 1) if not n or consumed / (samples / steps) >= n]
        by_hand = [batch.global_size] if consumed > samples else by_hand
        given = (batch.global_size, 1, 1, False, 1, *batch.rampup)
    else:
        return batch.global_size
    if not hasattr(calculators, kind):
        return by_hand[-1]
    theirs = getattr(calculators, kind)(*given)
    theirs.update(consumed, consistency_check=False)
    return theirs.get_current_global_batch_size()


class Walk:
    """A run, one iteration after the other: ``consumed``, ``rates`` and ``decays`` after each, from the first on.

    Goes on where ``before`` stopped, its schedule through that one's state.
    """

    def __init__(self, run, iterations=None, before=None):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        self.schedule = rates_of(run)(optimizer)
        self.consumed, self.rates, self.decays = [], [], []
        if before is not None:
            self.consumed, self.rates, self.decays = before.consumed[:], before.rates[:], before.decays[:]
            self.schedule.load_state_dict(before.schedule.state_dict())
        steps = run.steps
        while len(self.consumed) != iterations:
            done = self.consumed[-1] if self.consumed else 0
            size = size_by_megatron(run.batch, done)
            over = done + size > steps.samples if steps.by_samples else len(self.consumed) >= steps.iterations
            if over:
                break
            self.schedule.step(size)
            self.consumed.append(done + size)
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.decays.append(optimizer.param_groups[0]["weight_decay"])

    def position(self):
        found, last = Position(), 0
        for consumed in self.consumed:
            found.advance(consumed - last)
            last = consumed
        return found


def is_linear(rates, consumed, first, last):
    """Whether the rate falls from MAX at ``first`` samples to MIN at ``last``, in a straight line over samples."""
    wanted = [MAX + (MIN - MAX) * (c - first) / (last - first) for c in consumed if c > first]
    assert rates[-len(wanted) :] == pytest.approx(wanted)
    assert consumed[-1] == last


def resumed(folder, before, arguments, state=True):
    """``arguments`` as understood where ``before``'s checkpoint is loaded."""
    checkpoint = folder / f"global_step{len(before.consumed)}"
    checkpoint.mkdir()
    if state:
        write_position(checkpoint, before.position())
    write_latest(folder, checkpoint.name)
    return understood(f"{arguments} --load {folder}")
