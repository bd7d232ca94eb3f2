"""The training loop: Megatron's, around an engine whose pipeline stays full."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler

from noflush.launch.arguments.progress import Position
from noflush.launch.arguments.rampup import batch_size_at
from noflush.launch.arguments.settings import Settings
from noflush.launch.data.batches import MicroBatches
from noflush.launch.data.order import SampleOrder
from noflush.launch.refusal import RefusedError
from noflush.launch.signals import Signals
from noflush.launch.training import checkpoint
from noflush.launch.training.evaluations import evaluated_before, evaluates_at, start_within
from noflush.launch.training.folder_lock import FolderLock
from noflush.launch.training.late_lines import LateLines
from noflush.launch.training.log_line import (
    Interval,
    bubble_between,
    floating_point_operations,
    log_line,
)
from noflush.launch.training.stop import Stop
from noflush.launch.training.writers import Writers, chosen
from noflush.stage.not_written import NotWrittenError


def say(line: str) -> None:
    """Prints; the log of a run is its standard output."""
    print(line, flush=True)  # noqa: T201


class Training:
    """One rank's run.

    Args:
        settings: of the run.
        engine: DeepSpeed's.
        datasets: training, validation and test; None on stages that read no data.
        position: where to go on.
        parameters: of the whole model.
        signals: that tell it to stop.
        lock: of the folder of checkpoints, on rank 0.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Any,
        datasets: Sequence[Any],
        position: Position,
        parameters: int,
        signals: Signals,
        lock: FolderLock | None = None,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.position = position
        self.lock = lock
        self._train, self._valid, self._test = datasets
        self._parameters = parameters
        self._logs = dist.get_rank() == dist.get_world_size() - 1  # of the last stage, as Megatron's
        self._writers = Writers(settings) if self._logs else None
        self._stop = Stop(settings.steps, signals, engine)
        self._losses: list[torch.Tensor] = []
        self._lines = LateLines()
        self._figures: Sequence[Any] = ()
        self._skipped = 0
        self._spent = 0.0
        self._logged_at = position.consumed
        self._saved_at: int | None = position.iteration or None
        self._streams = contextlib.ExitStack()

    def run(self) -> str | None:
        """Trains to the end; returns why it stopped before, or None if it did not.

        However it ends, no process is left that reads data.
        """
        with self._streams:
            return self._run()

    def _run(self) -> str | None:
        steps = self.settings.steps
        reason = None
        if not steps.skip_train:
            reason = self._train_on()
            if reason is None and hasattr(self.engine, "drain"):
                # The last evaluation, and the checkpoint, are of all updates. A run that is to go on does not drain.
                self.engine.drain()
            self._save()
            self._finish_saves()
        if reason is None and steps.eval_iterations:
            for name, dataset in (("validation", self._valid), ("test", self._test)):
                self._evaluate(name, dataset, self.position.iteration)
        if self._writers:
            self._writers.close()
        return reason

    def _done(self) -> bool:
        return self.position.iteration >= self.settings.steps.iterations

    def _train_on(self) -> str | None:
        steps, position = self.settings.steps, self.position
        self._join_groups()
        data = self._stream(self._train, position.consumed, self.settings.batch.micro, of_group=True)
        self._log_start()
        reason = None
        while not self._done():
            size = batch_size_at(self.settings.batch, position.consumed)
            if size != self.engine.train_batch_size():
                self.engine.set_train_batch_size(size)
            begin = time.perf_counter()
            loss = self.engine.train_batch(data_iter=data)
            self._spent += time.perf_counter() - begin
            position.advance(size)
            self._losses.append(loss.detach())
            self._lines.say(before=position.iteration)
            if position.iteration % steps.log_every == 0:
                self._log(size)
            if steps.eval_iterations and evaluates_at(position.iteration, steps) and not self._done():
                self.say_rest()
                self._evaluate("validation", self._valid, position.iteration)
            if steps.save_every and position.iteration % steps.save_every == 0 and not self._done():
                self.say_rest()
                self._save()
            reason = self._stop.reason(position.iteration)
            if reason is not None:
                break
        self.say_rest()
        return None if self._done() else reason

    def say_rest(self) -> None:
        """Says the log lines that would otherwise be said in the next iteration."""
        self._lines.say(before=self.position.iteration + 1)

    def _join_groups(self) -> None:
        """Where this pipeline is one group of several: joins them, and goes on from where its peer stands."""
        group = getattr(self.engine, "group", None)
        if group is None:
            return
        try:
            group.join()
        except ConnectionError as error:
            raise RefusedError(str(error), everywhere=True) from None
        if self.position.iteration != self.engine.global_steps:  # a peer's, which may be behind this one's checkpoint
            self.position.iteration, self.position.consumed, self.position.sizes = 0, 0, []
        while self.position.iteration < self.engine.global_steps:
            self.position.advance(batch_size_at(self.settings.batch, self.position.consumed))

    def _stream(self, dataset: Any, consumed: int, micro: int, of_group: bool = False) -> MicroBatches | None:
        """Micro-batches of ``dataset``; ``of_group``: of the order that all groups share, where there are any."""
        if dataset is None:
            return None
        settings, grid = self.settings, self.engine.grid
        if of_group and getattr(self.engine, "group", None) is not None:
            seed = settings.steps.seed if settings.data.order == "cyclic" else None
            shared = BatchSampler(self.engine.group_samples(len(dataset), seed), settings.batch.micro, drop_last=True)
            return self._streams.enter_context(contextlib.closing(MicroBatches(dataset, shared, settings.data.workers)))
        order = SampleOrder(
            len(dataset),
            consumed,
            micro,
            grid.get_data_parallel_rank(),
            grid.get_data_parallel_world_size(),
            settings.data.order == "cyclic",
            settings.steps.seed,
        )
        return self._streams.enter_context(contextlib.closing(MicroBatches(dataset, order, settings.data.workers)))

    def _save(self) -> None:
        # The checkpoint of this iteration may be the newest complete one: it must not be written over.
        if self.settings.checkpoints.save and self.position.iteration != self._saved_at:
            if not self._whole("checkpoint"):
                return
            begin = time.perf_counter()
            settings = self.settings
            folders, model, tokens = settings.checkpoints, settings.model, settings.tokens
            checkpoint.save(self.engine, folders, model, tokens, self.position, self.lock)
            self._saved_at = self.position.iteration
            if dist.get_rank() == 0:
                where = f"{self.settings.checkpoints.save}/{checkpoint.tag_of(self.position.iteration)}"
                verb = "saving" if settings.block is not None and settings.block.async_save else "saved"
                say(f"{verb} {where}; training stood still for {time.perf_counter() - begin:.2f} s")

    def _whole(self, what: str) -> bool:
        """Whether ``what``, which needs all ranks, can be done: not by a group that has lost a stage of its world."""
        group = getattr(self.engine, "group", None)
        return group is None or bool(group.is_whole(what))

    def _finish_saves(self) -> None:
        try:
            if hasattr(self.engine, "finish_saves"):
                self.engine.finish_saves()
        except NotWrittenError as error:
            raise RefusedError(str(error), everywhere=True) from None

    def _evaluate(self, name: str, dataset: Any, iteration: int) -> None:
        """Mean loss over ``eval_iters`` global batches, from where the evaluation before ended; nothing drains."""
        if not self._whole("evaluation"):
            return
        steps, position = self.settings.steps, self.position
        needed, micro = steps.eval_iterations * steps.eval_size, steps.eval_micro
        start = evaluated_before(iteration, steps.eval_every, needed, steps.eval_from) if name == "validation" else 0
        data = None if dataset is None else self._stream(dataset, start_within(len(dataset), start, needed), micro)
        if not _agreed(self.engine, dataset is not None):
            return
        # All micro-batches in one go: the evaluation's own pipeline fills once.
        count = needed // (micro * self.settings.ranks.data)
        if micro != self.settings.batch.micro:  # DeepSpeed's own pipeline asks for shapes once
            self.engine.reset_activation_shape()
        loss = self.engine.eval_batch(data, num_micro_batches=count, bcast_loss=False)
        if micro != self.settings.batch.micro:
            self.engine.reset_activation_shape()
        if data is not None:
            data.close()
        if self._logs:
            mean = float(loss)
            perplexity = math.exp(min(20.0, mean))
            say(f" {name} loss at iteration {iteration} | lm loss value: {mean:.6E} | lm loss PPL: {perplexity:.6E} |")
            values = {f"lm loss {name}": mean}
            if self.settings.logs.validation_perplexity:
                values[f"lm loss {name} ppl"] = perplexity
            assert self._writers
            self._writers.write(values, iteration, position.consumed)

    def _log_start(self) -> None:
        self._figures = getattr(self.engine, "figures", ())
        self._skipped = getattr(self.engine, "skipped_batches", 0)

    def _log(self, size: int) -> None:
        losses, self._losses = self._losses, []
        spent, self._spent = self._spent, 0.0
        samples, self._logged_at = self.position.consumed - self._logged_at, self.position.consumed
        if not self._logs:
            return
        count, position, settings = len(losses), self.position, self.settings
        figures = getattr(self.engine, "figures", ())
        skipped = getattr(self.engine, "skipped_batches", 0)
        operations = floating_point_operations(
            settings.model.layers, settings.model.hidden, settings.model.sequence, self._parameters
        )
        seconds = spent / count
        whole = getattr(self.engine, "pipeline_norm", None)
        schedule = getattr(self.engine, "schedule", None)
        interval = Interval(
            seconds=seconds,
            learning_rate=self.engine.get_lr()[0],
            batch_size=size,
            loss=math.nan,
            scale=_scale(self.engine),
            norm=None if whole is None else whole.norm,
            skipped=skipped - self._skipped,
            nans=0,
            bubble=bubble_between(self._figures, figures) if figures else None,
            delay=schedule.max_delay(0) if schedule else 0,
            teraflops=operations * samples / spent / 1e12 / settings.ranks.world if settings.logs.throughput else None,
        )
        self._figures, self._skipped = figures, skipped
        line = partial(self._say, dataclasses.replace(position), interval, datetime.now())
        self._lines.put(position.iteration, losses, line)

    def _say(self, position: Position, interval: Interval, now: datetime, losses: torch.Tensor) -> None:
        """Prints and writes ``interval``, which ended at ``position``, with the ``losses`` of its iterations."""
        settings = self.settings
        finite = losses[losses.isfinite()]
        mean = finite.mean().item() if len(finite) else math.nan
        interval = dataclasses.replace(interval, loss=mean, nans=len(losses) - len(finite))
        say(log_line(position, settings.steps.iterations, interval, now))
        assert self._writers
        if position.iteration % settings.logs.tensorboard_every == 0 or settings.steps.log_every > 1:
            named = {
                "lm loss": interval.loss,
                "learning-rate": interval.learning_rate,
                "batch-size": interval.batch_size,
                "loss-scale": interval.scale,
                "grad-norm": interval.norm,
                "iteration-time": interval.seconds,
                "throughput": interval.teraflops,
                "bubble": interval.bubble,
                "delay": interval.delay,
            }
            self._writers.write(
                chosen(settings.logs, named, settings.ranks.world), position.iteration, position.consumed
            )


def _scale(engine: Any) -> float:
    optimizer = engine.optimizer
    return float(getattr(optimizer, "cur_scale", None) or getattr(optimizer, "loss_scale", None) or 1.0)


def _agreed(engine: Any, mine: bool) -> bool:
    """Whether the stages that read data have the dataset; stages between do not know."""
    has = torch.tensor([float(mine)], device=engine.device)
    dist.all_reduce(has, op=dist.ReduceOp.MAX)
    return bool(has.item())
