"""Executes one stage's orders: which weights, which message, which buffer, for every action.

Decides nothing: orders and versions come from `order`, storage from `versions`, transport from `channels`, and forward,
backward and update from a `StageWork`. One micro-batch of a middle stage::

    (1) RA  wait for the activation of m           (4) RG  wait for the gradient of m - L
    (2) F   bind its version, run forward          (5) B   bind that forward's version, check, run backward
    (3) SA  send the output on                     (6) SG  send the input's gradient back
                                                   (7) U   after every K-th backward: the next version

and between them, where `posting` says so, the receives are posted (PA, PG). Before a call it is opened (RH, SH, O); the
first one also says what activations will be (SS, RS).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from noflush.order.actions import COMPUTE, CONTROL, POSTS, Action, Op
from noflush.order.control import opening_order
from noflush.order.link_traffic import LinkTraffic
from noflush.order.posting import Posting, call_order, drain_order
from noflush.order.retirement import retired_by
from noflush.order.schedule import Schedule
from noflush.stage.channels import Neighbours
from noflush.stage.intake import Intake
from noflush.stage.messages import Payload, PayloadSpec, TensorSpec
from noflush.stage.payloads import check_alike, check_outputs
from noflush.stage.tied import TiedWeights
from noflush.stage.versions import WeightRing
from noflush.stage.wire import LinkForms
from noflush.watch.trace import Recorder


class StageWork(Protocol):
    """What the actions of a stage mean. ``buffer`` numbers a place for one micro-batch in flight."""

    def run_forward(self, micro_batch: int, buffer: int, received: Payload | None) -> Payload:
        """Loads what the stage reads from data, runs forward; returns the outputs."""

    def run_backward(self, buffer: int, gradients: list[Tensor] | None) -> None:
        """Backpropagates ``gradients`` of the differentiable outputs (None at the last stage: its loss)."""

    def input_gradients(self, buffer: int) -> list[Tensor]:
        """Gradients of the differentiable inputs; frees the buffer."""

    def run_update(self) -> int:
        """Reduces, clips, makes the next weight version and clears the gradients.

        Returns how many nanoseconds of it were spent waiting for other ranks.
        """

    def make_report(self, received: Tensor | None) -> Tensor:
        """What goes to the previous stage with a batch's last gradient; ``received`` came from the next one."""


class StageRunner:
    """One stage at work.

    Args:
        schedule, stage: what to do.
        ring: the stage's weight versions.
        neighbours: its channels.
        work: what the actions mean.
        intake: opens calls.
        recorder: where events go.
        report: spec of the report tensor that travels up with the last gradient of every batch.
        posting: when receives are posted.
        tied: weights that other stages use too.
        above, below: how the links to the stage before and to the next one carry activations and gradients.

    Attributes:
        after_compute: called after every forward, backward and update.
    """

    def __init__(
        self,
        schedule: Schedule,
        stage: int,
        ring: WeightRing,
        neighbours: Neighbours,
        work: StageWork,
        recorder: Recorder,
        report: TensorSpec,
        posting: Posting,
        intake: Intake,
        tied: TiedWeights,
        above: LinkForms,
        below: LinkForms,
    ) -> None:
        self.schedule = schedule
        self.stage = stage
        self.ring = ring
        self.neighbours = neighbours
        self.recorder = recorder
        self.calls = 0
        self.first_micro_batch = 0
        self.first_version = ring.newest
        self.batches_finished = 0
        self.after_compute: Callable[[Op], None] = lambda op: None
        self._work = work
        self._agreed = False
        self._report_spec = report
        self._posting = posting
        self._tied = tied
        self._above, self._below = above, below
        tied.carriage.follow(schedule, 0)
        self._outgoing: PayloadSpec | None = None
        self._incoming: PayloadSpec | None = None
        self._first_message = 0
        self._received: Payload | None = None
        self._to_send: Payload | None = None
        self._gradients: list[Tensor] | None = None
        self._report: Tensor | None = None
        self._do: dict[Op, Callable[[int], int | None]] = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.UPDATE: self._update,
            Op.SEND_ACTIVATION: self._send_activation,
            Op.RECV_ACTIVATION: self._recv_activation,
            Op.SEND_GRAD: self._send_grad,
            Op.RECV_GRAD: self._recv_grad,
            Op.POST_ACTIVATION: self._post_activation,
            Op.POST_GRAD: self.post_gradients,
            Op.SEND_SPEC: self._send_spec,
            Op.RECV_SPEC: self._recv_spec,
            Op.OPEN: intake.open,
            Op.RECV_HEADER: intake.receive_header,
            Op.SEND_HEADER: intake.send_header,
        }

    @property
    def updates(self) -> int:
        """Updates this stage has made, over all segments."""
        return self.ring.newest

    def open_call(self) -> None:
        """Runs the actions that open the next call, in the intake that was begun."""
        for action in opening_order(self.schedule.stages, self.stage, self.calls):
            begun = self.recorder.begin(action.op)
            self._do[action.op](action.index)
            if action.op is Op.RECV_HEADER:
                self.recorder.end(action.op, action.index, begun)

    def run_call(self) -> None:
        """Runs the actions of one `train_batch` call; user code then sees the newest weights."""
        self._run(call_order(self.schedule, self._posting, self.stage, self.calls, self._agreed))
        self._agreed = True
        self.calls += 1

    @property
    def next_message(self) -> int:
        """Number of the activation message with which the next call starts."""
        return self.message(self.calls * self.schedule.gas)

    def traffic(self) -> tuple[LinkTraffic | None, LinkTraffic | None]:
        """Bytes of a micro-batch on the links to the stage before and to the next one; None where there is none yet."""
        return self._traffic(self._incoming, self._above), self._traffic(self._outgoing, self._below)

    @staticmethod
    def _traffic(spec: PayloadSpec | None, forms: LinkForms) -> LinkTraffic | None:
        if spec is None:
            return None
        down = forms.activations.specs(spec.tensors)
        return LinkTraffic(sum(t.nbytes for t in down), sum(t.nbytes for t in forms.gradients.specs(spec.gradients())))

    def drain(self) -> None:
        """Finishes every micro-batch in flight; a new segment starts with the next call."""
        self._run(drain_order(self.schedule, self._posting, self.stage, self.calls))
        finished = self.calls * self.schedule.gas
        self._first_message += finished
        if finished:
            self._tied.carriage.sent(self._first_message)
        self.restart(self.first_micro_batch + finished)

    def restart(self, first_micro_batch: int) -> None:
        """Numbers the next segment from ``first_micro_batch`` and the newest version; nothing may be in flight."""
        self.calls = 0
        self.first_micro_batch = first_micro_batch
        self.first_version = self.ring.newest
        self.batches_finished = first_micro_batch // self.schedule.gas
        self._tied.carriage.follow(self.schedule, self._first_message)

    # ---- for checkpoints -----------------------------------------------------------------------------------

    @property
    def specs(self) -> tuple[PayloadSpec | None, PayloadSpec | None]:
        """What was agreed of the activations that come and go; None: nothing yet, or no such link."""
        return self._incoming, self._outgoing

    def position(self) -> dict[str, Any]:
        """Where the stage stands, for `stand_at`."""
        return {
            "calls": self.calls,
            "first_micro_batch": self.first_micro_batch,
            "first_version": self.first_version,
            "first_message": self._first_message,
            "batches_finished": self.batches_finished,
            "agreed": self._agreed,
            "specs": [spec and spec.to_words() for spec in self.specs],
        }

    def stand_at(self, position: dict[str, Any]) -> None:
        """Goes on from ``position``, once what was in flight there has been put back."""
        for name in ("calls", "first_micro_batch", "first_version", "batches_finished"):
            setattr(self, name, position[name])
        self._first_message, self._agreed = position["first_message"], position["agreed"]
        found = (None if words is None else PayloadSpec.from_words(words) for words in position["specs"])
        self._incoming, self._outgoing = found
        self.ring.bind_newest()

    def _run(self, order: Sequence[Action]) -> None:
        for action in order:
            _, op, index = action
            if op in POSTS or op in CONTROL:  # no time worth an event
                self._do[op](index)
                continue
            begun = self.recorder.begin(op)
            waited = self._do[op](index) or 0
            first = self.first_version if op is Op.UPDATE else self.first_micro_batch
            self.recorder.end(op, first + index, begun, waited)
            if op in COMPUTE:
                self.after_compute(op)
        self.ring.bind_newest()

    def number(self, m: int) -> int:
        """Micro-batch ``m`` of the segment as it is counted from the run's start."""
        return self.first_micro_batch + m

    def buffer(self, m: int) -> int:
        """Where micro-batch ``m`` of the segment is kept while it is in flight."""
        return m % self.schedule.in_flight(self.stage)

    def message(self, m: int) -> int:
        """Number of the messages of micro-batch ``m`` of the segment."""
        # Links count what they ever carried; a loaded checkpoint renumbers micro-batches, not messages.
        return self._first_message + m

    def _place(self, m: int) -> tuple[int, int]:
        """The batch of micro-batch ``m``, counted over the whole run, and which one of it that is."""
        return divmod(self.number(m), self.schedule.gas)

    def _gradient_specs(self, m: int) -> tuple[TensorSpec, ...]:
        gradients = self.gradient_specs()
        if self.ends_batch(m):
            return (*gradients, self._report_spec, *self._tied.specs_up())
        return (*gradients, self._report_spec) if self._reports(m, gradients) else gradients

    def ends_batch(self, m: int) -> bool:
        """Whether micro-batch ``m`` of the segment is the last of its batch."""
        return (m + 1) % self.schedule.gas == 0

    def _reports(self, m: int, gradients: Sequence[object]) -> bool:
        """Whether a report goes with the gradients of ``m``: with a batch's last, and where there are none at all.

        A message of nothing would not say that its activation has been taken.
        """
        return self.ends_batch(m) or not gradients

    def _post_activation(self, m: int) -> None:
        inbox = self.neighbours.activations_in
        assert inbox is not None
        assert self._incoming is not None
        while inbox.next_to_post <= self.message(m):
            inbox.post((*self.activation_specs(), *self._tied.specs_down(inbox.next_to_post)))

    def post_gradients(self, m: int) -> None:
        """Posts the receives of all gradients up to that of micro-batch ``m`` of the segment."""
        inbox = self.neighbours.gradients_in
        assert inbox is not None
        while inbox.next_to_post <= self.message(m):
            inbox.post(self._gradient_specs(inbox.next_to_post - self._first_message))

    def _recv_activation(self, m: int) -> None:  # (1)
        inbox = self.neighbours.activations_in
        assert inbox is not None
        assert self._incoming is not None
        taken, count = inbox.take(self.message(m)), len(self._incoming.tensors)
        self._tied.take_down(self.message(m), taken[count:])
        self._received = self.received(taken[:count])
        if self.neighbours.gradients_out is not None:
            # Where another may stand in for the stage above, gradients are kept until the one above that has what was
            # made of them.
            taken_by = self.stage - 1 if self.neighbours.above is None else self.stage - 2
            up_to = retired_by(Op.RECV_ACTIVATION, m, self.schedule.lag_in_call(taken_by))
            self.neighbours.gradients_out.retire(self.message(up_to))

    def activation_specs(self) -> tuple[TensorSpec, ...]:
        """Of what an activation brings this stage, as it travels, but for tied weights."""
        assert self._incoming is not None
        return self._above.activations.specs(self._incoming.tensors)

    def gradient_specs(self) -> tuple[TensorSpec, ...]:
        """Of the gradients of this stage's outputs, as they travel."""
        assert self._outgoing is not None
        return self._below.gradients.specs(self._outgoing.gradients())

    def received(self, tensors: Sequence[Tensor]) -> Payload:
        """What the stage before sent, as its outputs were, of an activation as it travelled."""
        spec = self._incoming
        assert spec is not None
        decoded = self._above.activations.decode(tensors, spec.tensors)
        for tensor, of in zip(decoded, spec.tensors, strict=True):
            tensor.requires_grad_(of.differentiable)
        return tuple(decoded) if spec.is_tuple else decoded[0]

    def coded(self, place: tuple[int, int], outputs: Payload) -> Sequence[Tensor]:
        """Outputs as they travel; ``place``: the batch, counted over the whole run, and which micro-batch of it."""
        assert self._outgoing is not None
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        return self._below.activations.encode(tensors, self._outgoing.tensors, *place)

    def received_gradients(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Of a gradient message as it travelled: the gradients of this stage's outputs, and what came with them."""
        assert self._outgoing is not None
        of, count = self._outgoing.gradients(), len(self._outgoing.gradients())
        return list(self._below.gradients.decode(tensors[:count], of)), tensors[count:]

    def coded_gradients(self, place: tuple[int, int], found: Sequence[Tensor], rest: list[Tensor]) -> list[Tensor]:
        """A gradient message: gradients ``found`` of this stage's inputs as they travel, and ``rest`` with them."""
        assert self._incoming is not None
        gradients = list(self._above.gradients.encode(found, self._incoming.gradients(), *place))
        if not gradients and not rest:
            rest = [torch.zeros(self._report_spec.shape, dtype=self._report_spec.dtype, device=self.ring.device)]
        return gradients + rest

    def _forward(self, m: int) -> None:  # (2)
        self.ring.tag(self.number(m), self.first_version + self.schedule.version(self.stage, m))
        self._tied.bind(self.number(m))
        outputs = self._work.run_forward(self.number(m), self.buffer(m), self._received)
        self._received = None
        if self.neighbours.activations_out is not None:
            check_outputs(outputs, self.stage)
            self._to_send = outputs
            self._agree_on_shape(m, outputs)

    def _agree_on_shape(self, m: int, outputs: Payload) -> None:
        spec = PayloadSpec.of(outputs)
        if self._outgoing is None:
            self._outgoing = spec
        else:
            check_alike(spec, self._outgoing, self.stage, f"micro-batch {self.number(m)}")

    def _send_spec(self, m: int) -> None:
        assert self._outgoing is not None
        assert self.neighbours.control_out is not None
        self.neighbours.control_out.send(self._outgoing.to_words(), before=self.message(m))

    def _recv_spec(self, m: int) -> None:
        assert self.neighbours.control_in is not None
        self._incoming = PayloadSpec.from_words(self.neighbours.control_in.take(self.message(m)))

    def _send_activation(self, m: int) -> None:  # (3)
        outbox, payload = self.neighbours.activations_out, self._to_send
        assert outbox is not None
        assert payload is not None
        outbox.send(self.message(m), (*self.coded(self._place(m), payload), *self._tied.to_send_down(self.message(m))))
        self._to_send = None

    def _recv_grad(self, m: int) -> None:  # (4)
        inbox = self.neighbours.gradients_in
        assert inbox is not None
        assert self._outgoing is not None
        self._gradients, rest = self.received_gradients(inbox.take(self.message(m)))
        if self.ends_batch(m):
            self._report = rest[0]
            self._tied.take_up(rest[1:])
        assert self.neighbours.activations_out is not None
        assert self.neighbours.control_out is not None
        up_to = self.message(retired_by(Op.RECV_GRAD, m, 0))
        self.neighbours.activations_out.retire(up_to)
        self.neighbours.control_out.retire(up_to)

    def _backward(self, m: int) -> None:  # (5)
        self.ring.bind_for_backward(self.number(m))
        self.ring.check(self.number(m))
        self._tied.bind_again(self.number(m))
        self._work.run_backward(self.buffer(m), self._gradients)
        self._gradients = None
        self.ring.release(self.number(m))
        self._tied.release(self.number(m))
        if self.ends_batch(m):
            self._report = self._work.make_report(self._report)
            self.batches_finished += 1

    def _send_grad(self, m: int) -> None:  # (6)
        outbox = self.neighbours.gradients_out
        assert outbox is not None
        assert self._incoming is not None
        found, rest = self._work.input_gradients(self.buffer(m)), []
        if self.ends_batch(m):
            assert self._report is not None
            rest = [self._report, *self._tied.to_send_up()]
        outbox.send(self.message(m), self.coded_gradients(self._place(m), found, rest))

    def _update(self, update: int) -> int:  # (7)
        waited = self._work.run_update()
        self._report = None
        return waited
