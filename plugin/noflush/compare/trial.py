"""One trial: a contestant trained from a seed under its delays, and what it lost on held-out text on the way."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from noflush.compare.corpus import Corpus
from noflush.compare.settings import Part, Record, Task, Trial
from noflush.demo import gpt, text
from noflush.methods.table import load
from noflush.simulate import DelaySimulator

POINTS: dict[Part, int] = {"search": 4, "report": 20}
"""Evaluations on the way; a search needs them to see a run diverge, and nothing else."""
_FEW = 4  # batches of each of them
_MANY: dict[Part, int] = {"search": 16, "report": 64}  # at the end
_TIMED = 5  # passes that are timed


def share_of_rate(update: int, updates: int) -> float:
    """What the learning rate is multiplied by at ``update`` (from 0): up over 5 %, then a cosine down to a tenth."""
    warm_up = max(1, updates // 20)
    if update < warm_up:
        return (update + 1) / warm_up
    done = min(1.0, (update - warm_up) / max(1, updates - warm_up))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


class Stopwatch:
    """Times what optimizers do in their steps, summed over the stages of an update."""

    def __init__(self) -> None:
        self.updates: list[float] = []
        self._sum = 0.0
        self._since = 0.0

    def watch(self, optimizer: Optimizer) -> Optimizer:
        """Has ``optimizer`` timed."""
        optimizer.register_step_pre_hook(self._start)
        optimizer.register_step_post_hook(self._stop)
        return optimizer

    def _start(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self._sum += time.perf_counter() - self._since

    def lap(self) -> None:
        """Ends an update."""
        self.updates.append(self._sum)
        self._sum = 0.0


def run_trial(task: Task, corpus: Corpus, trial: Trial, at: Callable[[int], None] = lambda update: None) -> Record:
    """Trains ``trial`` in this process; ``at(update)`` is told after every update.

    A loss that is not a number ends it as diverged, and so do two evaluations in a row above `Task.bound`, or the last
    one: a rule with a long momentum may leap once, when the learning rate is at its largest, and come back.
    """
    started = time.perf_counter()
    torch.manual_seed(trial.seed)
    layers = gpt.gpt_layers(task.vocabulary, task.sequence, task.width, task.heads, task.blocks(trial.stages))
    modules = gpt.split_by_blocks(layers, trial.stages)
    watch = Stopwatch()
    simulator = _simulator(task, trial, modules, watch)
    stream = text.batches(corpus.training, task.batch, task.sequence, trial.seed)
    few = list(itertools.islice(text.batches(corpus.held_out[trial.part], task.batch, task.sequence, 0), _FEW))

    def evaluate(batches: Any) -> float:
        return statistics.fmean(simulator.evaluate(*batch).item() for batch in batches)

    count = POINTS[trial.part]
    points = {round(trial.updates * i / count) for i in range(1, count + 1)}
    curve = [(0, evaluate(few))]
    diverged = above = False
    for update in range(1, trial.updates + 1):
        losses = [simulator.train_micro_batch(*next(stream)).item() for _ in range(task.gas)]
        watch.lap()
        at(update)
        diverged = not all(map(math.isfinite, losses))
        if not diverged and update in points:
            curve.append((update * task.tokens_per_update, evaluate(few)))
            was_above, above = above, not curve[-1][1] <= task.bound
            diverged = above and (was_above or update == trial.updates)
        if diverged:
            here = update * task.tokens_per_update
            curve = [*(point for point in curve if point[0] < here), (here, math.inf)]
            break
    many = text.batches(corpus.held_out[trial.part], task.batch, task.sequence, 1)
    return Record(
        curve=tuple(curve),
        loss=math.inf if diverged else evaluate(itertools.islice(many, _MANY[trial.part])),
        step_ms=1e3 * statistics.median(watch.updates),
        pass_ms=1e3 * task.gas * _seconds_of_pass(modules, *few[0]),
        skipped=len(simulator.skipped),
        seconds=time.perf_counter() - started,
    )


def _simulator(task: Task, trial: Trial, modules: list[nn.Sequential], watch: Stopwatch) -> DelaySimulator:
    rule: Any = load(trial.contestant.optimizer)
    params = task.params_of(trial.contestant, trial.lr)

    def rate_of(optimizer: Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: share_of_rate(u, trial.updates))

    return DelaySimulator(
        modules,
        gpt.next_token_loss,
        lambda weights: watch.watch(rule(weights, **params)),
        trial.contestant.plan(trial.stages, task.gas),
        clip=task.clip,
        make_lr_scheduler=rate_of,
    )


def _seconds_of_pass(modules: list[nn.Sequential], tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """Of forward and backward of a micro-batch, without what the simulator does to keep versions."""
    model = nn.Sequential(*modules)
    weights = [p for p in model.parameters() if p.requires_grad]
    taken = []
    for _ in range(_TIMED):
        since = time.perf_counter()
        torch.autograd.grad(gpt.next_token_loss(model(tokens), labels), weights)
        taken.append(time.perf_counter() - since)
    return statistics.median(taken)
