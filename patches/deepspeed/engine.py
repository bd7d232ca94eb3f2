"""DeepSpeed's pipeline engine, running without a flush.

This file joins noflush to DeepSpeed: construction, the `train_batch` contract, counters and reports. Checkpoints are in
`checkpoints`, `eval_batch` in `evaluation`, forward and backward of a micro-batch in `work`, and all that needs no host
in a `stage.Stage`.
Attributes of its own are prefixed ``_nf_``, because DeepSpeed's class is large and free with names.
"""

from __future__ import annotations

import atexit
import sys
from collections import OrderedDict
from typing import Any

import torch
from deepspeed.pipe import TiedLayerSpec
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from noflush.config import AsyncPipelineConfig
from noflush.methods.flat import Outcome
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.methods.table import METHODS, load
from noflush.order.schedule import Schedule
from noflush.patches.deepspeed.assembly import make_stage
from noflush.patches.deepspeed.checkpoints import Checkpoints
from noflush.patches.deepspeed.evaluation import Evaluation
from noflush.patches.deepspeed.groups import Group
from noflush.patches.deepspeed.saving import Saves
from noflush.patches.deepspeed.whole_matrices import arrange
from noflush.stage.late_reader import LateReader
from noflush.stage.messages import BatchNorm, StageFigures
from noflush.stage.payloads import check_batch
from noflush.stage.slices import Slices, StageSlices
from noflush.stage.stage import Stage
from noflush.watch import balance
from noflush.watch.progress import progress_line


def _say(line: str) -> None:
    """Prints where DeepSpeed prints its own progress; its logger is silent below warnings by default."""
    print(line, flush=True)  # noqa: T201


class NoFlushEngine(Checkpoints, Evaluation, PipelineEngine):  # type: ignore[misc]
    """A `PipelineEngine` whose pipeline stays full across `train_batch` calls.

    Built by `deepspeed.initialize` when the config has an enabled ``async_pipeline`` block. Beyond DeepSpeed's
    interface it has `drain`, `updates`, `lag`, `loss_step` and `batch_losses`.

    Attributes:
        has_one_norm: whether all stages share one gradient norm.
        batch_of_stage: the micro-batch that is about to go forward.
        loss_names: of the module's additional losses.

    Args:
        block: the checked JSON block.
        schedule: the checked schedule, of as many stages as the module has.
        args, kwargs: as `PipelineEngine` takes them.

    Raises:
        ScheduleError: the schedule could deadlock (checked before the first step).
    """

    # DeepSpeed's own, which carries no types.
    pipe_buffers: dict[str, list[Any]]
    num_pipe_buffers: int
    total_loss: Any
    total_additional_losses: Any
    micro_batches: int
    agg_train_loss: Tensor

    def __init__(self, block: AsyncPipelineConfig, schedule: Schedule, /, *args: Any, **kwargs: Any) -> None:
        host_config = kwargs["config_class"]
        tied = any(isinstance(spec, TiedLayerSpec) for spec in kwargs["model"]._layer_specs)
        # With a flush the norm of all stages need not be late.
        self.has_one_norm = schedule.flushes and (block.clip != "stage" or tied)
        # Stock timers are started twice on a non-last stage and crash; the recorder's figures replace them.
        self._nf_breakdown = bool(host_config.wall_clock_breakdown)
        host_config.wall_clock_breakdown = False
        super().__init__(*args, **kwargs)
        assert schedule.gas == self.micro_batches, (schedule, self.micro_batches)
        self.batch_of_stage: Any = None
        self._nf_samples_per_call = self.train_batch_size()
        self._nf_events: list[tuple[str, float, int]] = []
        self._nf_losses = LateReader()
        self._nf_updated = False
        self._nf_calls = 0
        self.loss_names = tuple(self.module.get_additional_losses() or ())
        self._reserve_pipe_buffers(schedule.in_flight(self.stage_id))
        # Stock spreads activations over the slices between stages; noflush's channels carry them whole.
        self.is_pipe_partitioned = self.is_grad_partitioned = False
        self._nf_stage, updated_by = make_stage(self, block, schedule, self._nf_slices(), 1 + len(self.loss_names))
        self.agg_train_loss = self._nf_stage.loss
        places = self.local_rank if self.use_node_local_storage() else self.global_rank
        self._nf_group = Group(self, block.groups) if block.groups is not None else None
        self.saves = Saves(self, block.async_save, places == 0)
        if block.trace_dir:
            atexit.register(self._nf_stage.recorder.write)
        if self.global_rank == 0:
            _say(
                f"noflush: {schedule.name}, weights {schedule.weights}, update by {updated_by}, "
                f"lag by stage {[schedule.lag(s) for s in range(schedule.stages)]}, "
                f"weight versions by stage {[schedule.versions_alive(s) for s in range(schedule.stages)]}"
            )
            rule = self._nf_stage.weights.rule
            if isinstance(rule, DelayAwareOptimizer):
                _say(f"noflush: {rule.about([schedule.mean_delay(s) for s in range(schedule.stages)])}")

    def _nf_slices(self) -> Slices:
        grid = self.grid
        rank, size = grid.get_slice_parallel_rank(), grid.get_slice_parallel_world_size()
        own = StageSlices(grid.get_slice_parallel_group(), rank, size) if size > 1 else None
        if self.has_one_norm:
            # Copies of one weight must be clipped alike: by the pipeline's norm, which the flush makes one batch's.
            return Slices(grid.get_model_parallel_group(), rank, size * self.num_stages, own)
        return Slices() if own is None else Slices(own.group, rank, size, own)

    # ---- what a user reads -------------------------------------------------------------------------------

    @property
    def updates(self) -> int:
        """Optimizer updates this stage has made; behind ``global_steps`` while micro-batches are in flight."""
        return self._nf_stage.updates

    @property
    def lag(self) -> int:
        """Micro-batches in flight at this stage between calls, once the pipeline is full."""
        return self.schedule.lag(self.stage_id)

    @property
    def schedule(self) -> Schedule:
        """What every stage does when, and with which delay."""
        return self._nf_stage.schedule

    @property
    def figures(self) -> tuple[StageFigures, ...]:
        """Figures of this stage and all before it, as told with the newest call's header; of all at the last stage."""
        return self._nf_stage.figures

    @property
    def pipeline_norm(self) -> BatchNorm | None:
        """Gradient norm over all stages, unscaled and before clipping, and the call whose batch it is of.

        The newest that every stage has told; tied weights count once, at their owner. The same on every rank after
        the same call: of a batch ceil(L/K) + 3 calls old, L being the first stage's lag. None before any.
        """
        return self._nf_stage.norm.newest

    @property
    def skipped_batches(self) -> int:
        """Batches that some stage so far has skipped for gradients that were not finite, as heard here."""
        return self._nf_stage.skipped_batches

    @property
    def pipeline_stage(self) -> Stage:
        """The stage at work: its runner, weight ring, channels and recorder."""
        return self._nf_stage

    def request_stop(self) -> None:
        """Asks for the run to stop; any rank may, also from a signal handler. See `stop_requested`."""
        self._nf_stage.request_stop()

    @property
    def stop_requested(self) -> bool:
        """Whether some rank called `request_stop`: true on every rank from the same call on.

        The request travels up with the losses and comes down with a call's header, so no rank waits to learn of it.
        """
        return self._nf_stage.stop_requested

    @property
    def loss_step(self) -> int | None:
        """The call (counted from 1, as ``global_steps``) whose loss `train_batch` last returned; None before any."""
        return self._nf_stage.reports.step

    def batch_losses(self) -> dict[int, float]:
        """Batch losses that this stage has learnt since it was last asked, by call (from 1, as ``global_steps``).

        Every call's loss comes once, the mean over micro-batches and replicas, after a `drain` those of all calls made;
        of what is never asked for the newest 1000 are kept. For scripts that average or plot losses: what
        `train_batch` returns is the newest loss known, which is late on all stages but the last, and nan until there
        is one. Waits for the device.
        """
        return self._nf_stage.batch_losses()

    # ---- training ----------------------------------------------------------------------------------------

    def train_batch(self, data_iter: Any = None) -> Tensor:
        """Trains on K = gradient_accumulation_steps micro-batches of ``data_iter``, without draining.

        Returns the newest batch loss known to this stage: 0-dim float tensor, the mean over the batch's
        micro-batches and the data-parallel replicas. Losses travel back with the gradients: the last stage
        returns this call's, stage s the one of ceil(L/K) calls ago (`loss_step` names it), and nan until the
        first has arrived: never again after that. `batch_losses` gives each call's loss once, with its number.

        Raises:
            DataExhausted: a StopIteration; the iterator ended before K micro-batches (on every stage).
            PeerError: a neighbouring stage died or hangs.
            NonFiniteGradients: a stage skipped too many updates in a row (on every stage, after a checkpoint).
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() requires gradients enabled. Use eval_batch() instead.")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        if self._nf_group is not None:
            self._nf_group.join()
        stage = self._nf_stage
        if stage.calls != self.global_steps:
            # The script has set global_steps itself, as Megatron-DeepSpeed's --finetune does after loading.
            if stage.runner.calls:
                self.drain()
            stage.renumber(self.global_steps)
        self.ready_to_train()
        self._nf_updated = False
        with stage.on_duty():
            try:
                stage.train_batch()
            finally:
                self.skipped_steps = stage.skipped
            self.global_steps += 1
            self.global_samples += self._nf_samples_per_call
            self._step_applied = self._nf_updated
            self._nf_after_call()
            return self.agg_train_loss.clone()

    @property
    def group(self) -> Group | None:
        """This pipeline as one group of several; None without ``replicas`` in the block."""
        return self._nf_group

    def group_samples(self, count: int, seed: int | None = 1234) -> Any:
        """A sampler of the samples that this group trains on, of an order that all groups share. On all ranks.

        For a `DataLoader` of micro-batches, ``DataLoader(data, batch_size=micro-batch, sampler=...)``, on the first
        and last stages. Joins the other groups first, if that is still to be done.

        Args:
            count: samples of the data set.
            seed: of each epoch's shuffling, the same at all groups; None: no shuffling.

        Raises RuntimeError without ``replicas`` in the block; else as `Group.join`.
        """
        if self._nf_group is None:
            raise RuntimeError("group_samples() needs async_pipeline.replicas in the DeepSpeed config")
        return self._nf_group.samples(count, seed)

    def drain(self) -> None:
        """Finishes every micro-batch in flight. Collective: call it on all ranks.

        Afterwards every stage has made as many updates as calls; the next call fills the pipeline anew. The updates
        made here follow the learning-rate schedule like any others. (The authors' released code freezes the rate
        while it drains, at each validation, and jumps afterwards; then a run's rates would depend on how often it was
        looked at.)
        """
        # Recomputed forwards must see the mode of the first ones.
        was_training = self.module.training
        self.module.train()
        self._nf_stage.drain()
        self.module.train(was_training)
        self.skipped_steps = self._nf_stage.skipped
        self._nf_write_events(before=sys.maxsize)

    # ---- what its `EngineWork` asks of this engine ----------------------------------------------------------

    def ready_to_train(self) -> None:
        """What DeepSpeed sets before a batch."""
        self.module.train()
        self._compute_loss = True
        self.fwd_outputs: list[Any] = []

    def _next_batch(self) -> Any:
        if not self.evaluating:
            return self.batch_of_stage
        batch = super()._next_batch()
        check_batch(batch, self.stage_id, self.num_stages)
        return batch

    def updated(self, outcome: Outcome) -> None:
        """An update was made: next learning rate (for `work`)."""
        self._global_grad_norm = outcome.norm
        self._nf_updated = True
        if self.global_rank == 0 and self.monitor.enabled:
            samples = self._nf_samples_after(self._nf_stage.updates)
            self._nf_events.append(("Train/Samples/lr", self.get_lr()[0], samples))
        if self.lr_scheduler is not None:
            self.step_schedule()

    def step_schedule(self) -> None:
        """The learning-rate schedule goes on by an update."""
        try:
            self.lr_scheduler.step()
        except TypeError:  # Megatron's schedulers count samples
            self.lr_scheduler.step(self._nf_samples_per_call)

    def heard(self, step: int, report: Tensor) -> None:
        """The losses of call ``step`` are known here (for `work`)."""
        self._nf_show(report)
        if self.global_rank == 0 and self.monitor.enabled:
            self._nf_losses.put(self.global_steps, self._nf_samples_after(step), report[:1])

    def _nf_show(self, report: Tensor) -> None:
        self.agg_train_loss = report[0].float()
        if self.loss_names:
            values = report[1 : 1 + len(self.loss_names)].float()
            self.agg_additional_losses = OrderedDict(zip(self.loss_names, values, strict=True))

    def _nf_samples_after(self, batch: int) -> int:
        """Samples up to batch number ``batch``; all batches since the newest finished call's are of one size."""
        samples: int = self.global_samples + (batch - self.global_steps) * self._nf_samples_per_call
        return samples

    # ---- reports -----------------------------------------------------------------------------------------

    def _nf_after_call(self) -> None:
        self.saves.poll()
        every = self.steps_per_print()
        due = every is not None and self.global_steps % every == 0
        if due:
            interval = self._nf_stage.recorder.take_interval()
            self._nf_stage.reports.bubble = interval["bubble"]
            if self.global_rank == 0:
                self._report_progress(self.global_steps)
                self._nf_print(interval)
                self._nf_events.append(("Train/Samples/bubble", interval["bubble"], self.global_samples))
        self._nf_write_events(before=self.global_steps - 1)
        self._nf_calls += 1
        if self._nf_calls == balance.CALLS:
            self._nf_say_balance()

    def _nf_say_balance(self) -> None:
        figures, grid = self.figures, self.grid
        first = grid.get_data_parallel_rank() == 0 and grid.get_slice_parallel_rank() == 0
        if first and len(figures) == self.num_stages > 1:  # at the last stage
            calls = self._nf_calls - 1  # they were told as the newest call was opened
            _say(f"noflush: {balance.balance_line([of.busy_ns / 1e6 / calls for of in figures])}")

    def _nf_print(self, interval: dict[str, float]) -> None:
        line = progress_line(
            steps=self.global_steps,
            loss=float(self.agg_train_loss),
            loss_step=self.loss_step,
            additional={k: float(v) for k, v in (self.agg_additional_losses or {}).items()},
            seconds=interval["seconds"] / self.steps_per_print(),
            samples=self._nf_samples_per_call,
            bubbles=self._nf_stage.reports.bubbles(),
            skipped=self._nf_stage.reports.skipped(self._nf_stage.skipped),
            scale=self._nf_stage.reports.scale() if self.fp16_enabled() else None,
            breakdown=interval if self._nf_breakdown else None,
        )
        _say(line)

    def say(self, line: str) -> None:
        """Prints ``line``, once in the whole job (for `work`)."""
        if self.global_rank == 0:
            _say(f"noflush: {line}")

    def say_here(self, line: str) -> None:
        """Prints ``line``, by whichever rank."""
        _say(f"noflush: {line}")

    def _nf_write_events(self, before: int) -> None:
        """Hands rank 0's monitor what has come in: losses and rates where they belong, not where they were learnt.

        ``before``: losses learnt in calls below; read a call late, so that no call waits for its device.
        """
        losses = self._nf_losses.take(before)
        events = [("Train/Samples/train_loss", loss, samples) for samples, (loss,) in losses] + self._nf_events
        self._nf_events = []
        if events and self.global_rank == 0 and self.monitor.enabled:
            self.monitor.write_events(events)

    # ---- evaluation, and another batch size ----------------------------------------------------------------------

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """As DeepSpeed's: changes K = gradient_accumulation_steps, on all ranks at the same call.

        Another K has other delays and weight versions, so the pipeline drains; it fills anew with the next call. The
        size it has costs nothing (Megatron-DeepSpeed states it before every call).

        Raises:
            ValueError: no multiple of micro-batch size x replicas, or a K that the weight policy cannot have; or
                another size with ``replicas.reroute``.
        """
        if train_batch_size == self.train_batch_size():
            return
        if self._nf_group is not None and self._nf_group.lost_stages is not None:
            raise ValueError(
                f"set_train_batch_size({train_batch_size}): with async_pipeline.replicas.reroute the batch size stays "
                f"{self.train_batch_size()}: another group's stage may be serving this one's micro-batches"
            )
        unit = self.train_micro_batch_size_per_gpu() * self.dp_world_size
        gas, rest = divmod(train_batch_size, unit)
        if rest or gas < 1:
            raise ValueError(
                f"set_train_batch_size({train_batch_size}): it must be a multiple of {unit}, the micro-batch size x "
                "data-parallel replicas"
            )
        self._nf_stage.change_gas(gas)
        super().set_train_batch_size(train_batch_size)
        self._nf_samples_per_call = train_batch_size

    # ---- optimizers --------------------------------------------------------------------------------------

    def get_global_grad_norm(self) -> Tensor | None:
        """Norm of this stage's gradients at its newest update, unscaled and before clipping: 0-dim; None before any."""
        norm = self._global_grad_norm
        return norm.clone() if isinstance(norm, Tensor) else None

    def _is_supported_optimizer(self, optimizer_name: str) -> bool:
        return optimizer_name in METHODS or bool(super()._is_supported_optimizer(optimizer_name))

    def _configure_zero_optimizer(self, optimizer: Any) -> Any:
        arrange(optimizer, self.dp_world_size, self.param_names)
        return super()._configure_zero_optimizer(optimizer)

    def _configure_bf16_optimizer(self, optimizer: Any) -> Any:
        arrange(optimizer, self.dp_world_size, self.param_names)
        return super()._configure_bf16_optimizer(optimizer)

    def _configure_basic_optimizer(self, model_parameters: Any) -> Any:
        if self.optimizer_name() not in METHODS:
            return super()._configure_basic_optimizer(model_parameters)
        return load(self.optimizer_name())(model_parameters, **(self.optimizer_params() or {}))
