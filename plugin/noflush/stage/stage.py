"""One pipeline stage at work, whoever drives it: a host's engine, or a plain loop (`plain`).

A call goes in two steps: `open_call` agrees on it with the other stages and hears what they have to tell, `run_call`
runs it. The pipeline stays full between calls; `drain` finishes what is in flight. What forward, backward and the data
are is the `Work`'s business, where weights lie that of `Weights`, how they are updated that of a `StageUpdate`.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from noflush.failure import last_words
from noflush.methods.method import Place
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.order.deadlock import prove
from noflush.order.depth import DepthChoice
from noflush.order.detours import replaceable, scale_with_guests
from noflush.order.policies import ceil_div
from noflush.order.posting import Posting, posting_of
from noflush.order.schedule import Schedule
from noflush.stage.alone import is_alone
from noflush.stage.connect import connect, connect_alone
from noflush.stage.groups import without_splits
from noflush.stage.heard import Heard
from noflush.stage.intake import Intake
from noflush.stage.late_notice import LateNotice
from noflush.stage.loss_scale import TravellingScale
from noflush.stage.measured_depth import measured
from noflush.stage.messages import BatchReports, Payload, ReportLayout, StageFigures, TensorSpec
from noflush.stage.payloads import check_batch
from noflush.stage.peer_watch import PeerWatch
from noflush.stage.pipeline_norm import PipelineNorm
from noflush.stage.prefetch import Prefetch, copied
from noflush.stage.ranks import Ranks
from noflush.stage.runner import StageRunner
from noflush.stage.skips import UpdateGuard
from noflush.stage.tied import Tie, TiedWeights
from noflush.stage.update import StageUpdate
from noflush.stage.versions import WeightRing
from noflush.stage.weights import Weights
from noflush.stage.wire import LinkForms
from noflush.stage.work import DEFAULTS, StageOptions, Work
from noflush.watch.device_time import DeviceTimes
from noflush.watch.trace import Recorder

_CALLS_PER_TRACE_FILE = 200
_MEASURED_MICRO_BATCHES = 16
Forward = tuple[int, dict[str, Any]]


class Stage:
    """One stage.

    Args:
        schedule: of as many stages as a pipeline has ranks.
        ranks: who is who; every rank makes its stage at the same time.
        device: where it computes.
        weights: its parameters, gradients and masters.
        update: how it updates them.
        work: what it computes.
        options: the user's.
        tied: what `tied.TiedWeights` takes: the pipeline's ties, and of each the parameter that this stage has.
        scaler: gives the fp16 loss scaler (a checkpoint may replace it); None without fp16.

    Raises:
        ScheduleError: the schedule could deadlock.
        ValueError: an aligned schedule with a look-ahead.

    Attributes:
        schedule, stage, options, ring, runner, recorder, guard, reports, norm, weights, update: its parts.
        calls: calls made, those of a loaded checkpoint included.
        figures: of this stage and all before it, as told with the newest call's header.
        stop_requested: whether some rank asked for the run to stop: true on every rank from the same call on.
        depth: what `measure_depth` last chose, and by which figures; None before.
        heard: of the run's batches.
        after_update: called after every update, before any micro-batch uses the new version.
        update_done: called when the learning rate's schedule has gone on too.
        before_call: called before a call is opened.
        batch_read: called with the number of each micro-batch that is read from data, and with it.
        guests: of how many micro-batches of other groups gradients have been added since the last update.
        forwards: of the micro-batches that went forward last, as many as are in flight between calls: number, and as
            "random" what layers drew from, as "batch" the micro-batch where the stage reads data.
    """

    def __init__(
        self,
        schedule: Schedule,
        ranks: Ranks,
        device: torch.device,
        weights: Weights,
        update: StageUpdate,
        work: Work,
        options: StageOptions = DEFAULTS,
        scaler: Callable[[], Any] | None = None,
        tied: tuple[Sequence[Tie], Mapping[int, Parameter]] = ((), {}),
    ) -> None:
        backend = dist.get_backend()
        alone = is_alone()
        self.posting: Posting = options.posting or posting_of("gloo" if alone else backend)
        prove(schedule, self.posting, options.one_norm)
        self.schedule, self.ranks, self.device, self.stage = schedule, ranks, device, ranks.stage
        self.weights, self.update, self.work = weights, update, work
        self.options, self._scaler = options, scaler
        self.calls = 0
        self.figures: tuple[StageFigures, ...] = ()
        self.stop_requested = False
        self.heard = Heard()
        self.forwards: deque[Forward] = self._room_for_forwards()
        self.after_update: Callable[[], None] = lambda: None
        self.update_done: Callable[[], None] = lambda: None
        self.before_call: Callable[[], None] = lambda: None
        self.guests = 0
        self.batch_read: Callable[[int, Any], None] = lambda micro_batch, batch: None
        self._scale: Tensor | float | None = None
        self.scale_owner: TravellingScale | None = None
        layout = ReportLayout(options.losses, schedule.stages)
        self.reports = BatchReports(layout, self.stage, device)
        clock = DeviceTimes() if device.type == "cuda" else None
        self.recorder = Recorder(self.stage, ranks.rank, options.trace_dir, device=clock)
        # What no optimizer updates has one version for ever, and stays where it is.
        self.ring = WeightRing(
            weights.layouts,
            schedule.versions_alive(self.stage),
            not schedule.policy.live,
            home=weights.home,
            device=device,
        )
        last_words.attend(ranks.rank, 1 if alone else ranks.world, ranks.name)
        if alone:
            neighbours = connect_alone(self.stage, schedule.stages, device, options.peer_timeout_s)
        else:
            pipelines = ranks.pipelines if ranks.stages > 1 else []
            may_be_lost = replaceable(schedule.stages, [tie.stages for tie in tied[0]]) if options.reroute else ()
            neighbours = connect(pipelines, ranks.rank, device, options.peer_timeout_s, may_be_lost)
        if neighbours.attention is not None:
            own = f"stage {self.stage} (rank {ranks.rank})"
            LateNotice(neighbours.attention, own, options.peer_timeout_s).start()
        self.tied = TiedWeights(tied[0], self.stage, tied[1], ranks.pipelines, ranks.rank)
        self.intake = self._make_intake(neighbours)
        self.runner = StageRunner(
            schedule,
            self.stage,
            self.ring,
            neighbours,
            self,
            self.recorder,
            TensorSpec((layout.words,), torch.float64, False),
            self.posting,
            self.intake,
            self.tied,
            LinkForms(options.wire, self.stage - 1, ranks.replica),
            LinkForms(options.wire, self.stage, ranks.replica),
        )
        self.norm = PipelineNorm(counts=not options.one_norm or self.stage == 0)
        # Nobody is watched on gloo, whose waits notice by themselves.
        watched = () if alone or backend == "gloo" else neighbours.watched
        self.watch = PeerWatch(watched, _mark if torch.cuda.is_available() else None)
        self.watch.start()
        self._tell_methods()
        rule = weights.rule
        looks_ahead = isinstance(rule, DelayAwareOptimizer) and any(group["look_ahead"] for group in rule.param_groups)
        if schedule.aligned and schedule.lag(0) and looks_ahead:
            raise ValueError(
                "eval_weights 'aligned' with a look-ahead: stages keep what forwards compute with, which lies ahead of "
                "the true weights; use 'newest' (the true ones), or look_ahead 0"
            )
        self.guard = UpdateGuard(
            schedule, self.stage, layout, options.max_skipped_updates, options.stop_dir, self._scales_dynamically()
        )
        self._restart_scale()
        self.depth: DepthChoice | None = None
        self._measure_after: int | None = None
        self._measure_soon()

    def _measure_soon(self) -> None:
        """Has the depth chosen once the pipeline has been full for some micro-batches."""
        if self.options.auto_depth and self.schedule.stages > 1:
            steady = ceil_div(_MEASURED_MICRO_BATCHES, self.schedule.gas)
            self._measure_after = self.calls + self.schedule.calls_until_alike + steady

    def _make_intake(self, neighbours: Any) -> Intake:
        ranks, first, last = self.ranks, self.stage == 0, self.stage == self.schedule.stages - 1
        replicas = None
        if ranks.replicas > 1:
            readers = [pipeline[0] for pipeline in ranks.pipelines]
            with without_splits():
                patience = timedelta(seconds=self.options.peer_timeout_s)
                group = dist.new_group(readers, timeout=patience, backend="gloo")
            replicas = group if first else None
        return Intake(
            self.schedule.gas,
            first or last,
            self.work.pull,
            Prefetch(self.device, first, last),
            neighbours.control_in,
            neighbours.control_out,
            replicas,
        )

    # ---- what a user reads -------------------------------------------------------------------------------

    @property
    def updates(self) -> int:
        """Updates this stage has made; behind `calls` while micro-batches are in flight."""
        return self.ring.newest

    @property
    def skipped(self) -> int:
        """Updates that this stage has skipped for gradients that were not finite."""
        return self.guard.skips.total

    @property
    def skipped_batches(self) -> int:
        """Batches that this stage has heard were skipped, by itself or a stage before it."""
        return self.heard.skipped

    def request_stop(self) -> None:
        """Asks for the run to stop; any rank may, also from a signal handler.

        The request travels up with the losses and comes down with a call's header (`stop_requested`), so no rank waits
        to learn of it.
        """
        self.guard.stop_requested = True

    @property
    def loss(self) -> Tensor:
        """The newest batch loss known here (`reports.step` names its call): 0-dim float32; nan before any."""
        newest = self.reports.newest
        return torch.tensor(math.nan, device=self.device) if newest is None else newest[0].float()

    def batch_losses(self) -> dict[int, float]:
        """Batch losses that this stage has learnt since it was last asked, by call (from 1), each once.

        Of what is never asked for the newest 1000 are kept. Waits for the device.
        """
        return self.heard.take_losses()

    # ---- a call ------------------------------------------------------------------------------------------

    def train_batch(self) -> None:
        """One call: `open_call` and `run_call`. Raises what they raise."""
        if self.calls == self._measure_after:
            self.measure_depth()
        begun = self.recorder.begin(None)
        with self.on_duty():
            self.open_call()
            self.run_call()
            self.recorder.end_call(begun)
        if self.calls % _CALLS_PER_TRACE_FILE == 0:
            self.recorder.write()

    def on_duty(self) -> AbstractContextManager[None]:
        """What is done within needs the neighbours: one that dies then ends this process too, in bounded time."""
        return self.watch.on_duty()

    def open_call(self) -> None:
        """Agrees with the other stages on the next call, and hears what they have to tell.

        Raises:
            DataExhausted: the data ended before K micro-batches (on every stage; nothing is lost).
            NonFiniteGradients: a stage skipped too many updates in a row (on every stage, after a checkpoint).
            PeerError: a neighbouring stage died or hangs.
        """
        self.before_call()
        guard = self.guard
        notices = guard.notices(before=self.calls - 1)
        known = self.norm.tell(before=self.calls - 1) if self.stage == 0 else None
        notices = replace(notices, norm=known, figures=(StageFigures(*self.recorder.totals()),))
        self.intake.begin(self.calls, self.runner.next_message, notices)
        self.runner.open_call()
        notices = self.intake.settle()
        if notices.stopped_by is not None:
            folder, tag = guard.stop_dir(), f"stopped_global_step{self.calls}"
            self.work.save_stopped(folder, tag)
            raise guard.error(notices.stopped_by, f"{folder}/{tag}")
        self.figures, self.stop_requested = notices.figures, notices.stop_requested
        self.norm.hear(self.calls, notices.norm)
        self._hear_of_skipped(notices.skipped)

    def run_call(self) -> None:
        """Runs the call that is open: K forwards, and the backwards and updates that are due."""
        self.runner.run_call()
        self.calls += 1

    def _hear_of_skipped(self, batches: tuple[int, ...]) -> None:
        if self.scale_owner is not None:
            for batch in batches:
                self.scale_owner.hear(batch)
        self.heard.of_skipped(batches, self.calls - 2 * self.guard.horizon)

    # ---- what the runner's actions mean ------------------------------------------------------------------

    def run_forward(self, micro_batch: int, buffer: int, received: Payload | None) -> Payload:
        """`runner.StageWork`."""
        batch = None
        if self.intake.reads:
            batch = self.intake.next()
            check_batch(batch, self.stage, self.schedule.stages)
            self.batch_read(micro_batch, batch)
        if self.forwards.maxlen:
            self.forwards.append((micro_batch, {"random": self.work.random_state(), "batch": copied(batch)}))
        return self.work.forward(buffer, received, batch)

    def run_backward(self, buffer: int, gradients: list[Tensor] | None) -> None:
        """`runner.StageWork`."""
        if gradients is None and self.scale_owner is not None and self._scale is None:
            self._scale = self.scale_owner.begin(self.ring.newest)
        self.work.backward(buffer, gradients)

    def input_gradients(self, buffer: int) -> list[Tensor]:
        """`runner.StageWork`."""
        return self.work.input_gradients(buffer)

    def run_update(self) -> int:
        """`runner.StageWork`."""
        for param, gradient in self.tied.owed():
            self.update.add_gradient(param, gradient)
        whole = self.norm.of_update(self.ring.newest)
        if not self.options.late_norm or self.schedule.stages == 1:
            whole = 0.0
        scale = 1.0 if self._scale is None else self._scale
        if self.guests:
            scale, self.guests = scale * scale_with_guests(self.schedule.gas, self.guests), 0
        outcome = self.update.run(self.ring, scale, whole)
        self.after_update()
        self.norm.note(outcome.norm)
        self.guard.skips.note(self.calls, self.ring.newest, outcome)
        self._scale = None
        self.work.updated(outcome)
        self.update_done()
        return self.weights.slices.waits.take()

    def make_report(self, received: Tensor | None) -> Tensor:
        """`runner.StageWork`: the losses of a finished batch and the stages' figures, on their way up."""
        reports, guard = self.reports, self.guard
        if received is None:
            received = reports.first(self.work.batch_losses(), 1.0 if self._scale is None else self._scale)
        step = self.runner.batches_finished + 1
        report = reports.add(received, step, guard.skips.total, guard.skips.in_a_row, guard.stop_requested)
        if self._scaler is not None:
            self._scale = report[reports.layout.scale]
        squares = report[reports.layout.squares] = self.norm.add_to(report[reports.layout.squares])
        if self.stage == 0:
            self.norm.arrived(self.calls, step - 1, squares)
        self.heard.loss(step, report[0].float())
        guard.hear(self.calls, step, report)
        self.work.heard(step, report)
        return report

    # ---- between calls -----------------------------------------------------------------------------------

    def drain(self) -> None:
        """Finishes every micro-batch in flight; on all ranks. Every stage has then made as many updates as calls.

        The newest weights are the true ones (a look-ahead starts anew), and lie where the `Weights` had them at first,
        which hosts' checkpoints expect.
        """
        with self.recorder.outside_calls(), self.on_duty():
            self.runner.drain()
            self.runner.neighbours.flush()
            if self.device.type == "cuda":
                # A rank that ends takes with it what its neighbours have not received: nobody goes on before all have.
                torch.cuda.synchronize()
                if self.schedule.stages > 1:
                    dist.barrier(group=self.ranks.group)
            self.guard.settle(before=sys.maxsize)
            self.norm.restart()
            if self._scaler is not None:
                self._agree_on_scale(self._scaler())
            self.update.land(self.ring)
            self.ring.go_home()
            self.weights.point_at(self.ring.newest_flats)
            self.tied.refresh()
        self.recorder.write()

    @contextmanager
    def at_true_weights(self) -> Iterator[None]:
        """Within, parameters are the newest true weights, not what forwards use: for checkpoints, on all ranks.

        Micro-batches stay in flight.
        """
        flats = self.update.true_weights(self.ring)
        with nullcontext() if flats is None else self.ring.showing(flats), self.tied.showing():
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within, parameters are those to be evaluated, on all ranks; micro-batches stay in flight.

        Each stage's newest true weights, or with an aligned schedule all of the version that is stage 0's newest.
        """
        if not self.schedule.aligned:
            with self.at_true_weights():
                yield
            return
        version = self.runner.first_version + self.schedule.aligned_version(self.runner.calls)
        with self.ring.showing(self.ring.flats_of(version)), self.tied.showing():
            yield

    def renumber(self, calls: int) -> None:
        """Numbers versions, micro-batches and calls from ``calls`` on; nothing may be in flight."""
        self.calls = calls
        self.ring.restart(calls)
        self.runner.restart(calls * self.schedule.gas)
        self._restart_scale()
        self.reports.clear()
        if self._measure_after is not None:
            self._measure_soon()

    def restart(self, calls: int, skipped: int) -> None:
        """Goes on from a checkpoint of ``calls`` calls that was loaded into a drained stage.

        Forgets what belongs to the run before: micro-batches kept after `DataExhausted`, losses not asked for.
        """
        self.renumber(calls)
        self.tied.refresh()
        self.intake.clear()
        self.guard.restart(skipped)
        self.heard.forget_losses()
        self._measure_soon()

    def _room_for_forwards(self) -> deque[Forward]:
        live = self.schedule.backward_sees_live_weights
        return deque(maxlen=0 if live else self.schedule.lag(self.stage))

    def tell_all(self, mine: Any) -> list[Any]:
        """Every stage's ``mine``, in order; on all stages."""
        told: list[Any] = [mine] * self.schedule.stages
        if self.schedule.stages > 1:
            dist.all_gather_object(told, mine, group=self.ranks.group)
        return told

    def change_gas(self, gas: int) -> None:
        """Another K, on all ranks at the same call: drains, and fills anew with the next call.

        Raises ValueError for a K that the weight policy cannot have, before anything has changed.
        """
        self._follow(replace(self.schedule, gas=gas))
        self.intake.set_gas(gas)
        self.renumber(self.calls)

    def change_extra(self, extra: int) -> None:
        """Another `Schedule.extra_in_flight`, on all ranks at the same call: drains, and fills anew.

        Raises ValueError for one that the schedule cannot have, before anything has changed.
        """
        self._follow(replace(self.schedule, extra_in_flight=extra))
        # Numbers stay, and so do the losses known; messages and the scale follow the new lags.
        self.runner.restart(self.calls * self.schedule.gas)
        self._restart_scale()

    def measure_depth(self) -> None:
        """Measures compute and links, chooses how many more micro-batches in flight hide them, and changes to it.

        On all ranks at the same call; drains. Sets `depth`.
        """
        self._measure_after = None
        self.drain()
        with self.on_duty():
            self.depth = measured(self)
        self.work.say(str(self.depth))
        if self.depth.extra != self.schedule.extra_in_flight:
            self.change_extra(self.depth.extra)

    def _follow(self, schedule: Schedule) -> None:
        prove(schedule, self.posting, self.options.one_norm)
        self.drain()
        self.schedule = self.runner.schedule = schedule
        self.ring.grow(schedule.versions_alive(self.stage))
        self.forwards = self._room_for_forwards()
        self.work.reserve(schedule.in_flight(self.stage))
        self.guard.follow(schedule)
        self._tell_methods()

    def _tell_methods(self) -> None:
        rule = self.weights.rule
        if isinstance(rule, DelayAwareOptimizer):
            delay = self.schedule.mean_delay(self.stage)
            rule.set_stage(Place(self.stage, self.schedule.stages, delay, self.weights.slices.of_stage))

    # ---- the loss scale of fp16 --------------------------------------------------------------------------

    def _scales_dynamically(self) -> bool:
        return self._scaler is not None and bool(getattr(self._scaler(), "dynamic", False))

    def _restart_scale(self) -> None:
        """The last stage takes over the scaler, which a checkpoint may have replaced."""
        self._scale, self.scale_owner = None, None
        if self._scaler is not None and self.stage == self.schedule.stages - 1:
            self.scale_owner = TravellingScale(self._scaler(), self.guard.horizon)

    def _agree_on_scale(self, scaler: Any) -> None:
        """On a drained pipeline: the last stage hears of every overflow, and all stages of its scaler.

        So a checkpoint holds one scaler, and a resumed run scales as this one goes on to.
        """
        mine = [*self.guard.take_untold(), *self.intake.take_skipped()]
        told = self.tell_all(mine)
        self._hear_of_skipped(tuple(sorted({batch for batches in told for batch in batches})))
        if self.scale_owner is not None:
            self.scale_owner.settle()
        self.share_scaler()

    def share_scaler(self) -> None:
        """Every stage's fp16 scaler is the last one's from here on; on all ranks.

        Between two calls nobody but the last stage uses his: a checkpoint shall hold one.
        """
        if self._scaler is not None:
            scaler = self._scaler()
            vars(scaler).update(self.tell_all(vars(scaler))[-1])


def _mark() -> Any:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
