"""What a stage does for a pipeline that has lost its like: the work of micro-batches that are guests here.

In turn with its own work, one piece after each of its own forwards and backwards, and whenever it waits for a message
of its own, since two groups may need each other. Weights are its newest. Nothing is kept of a guest but its input:
backward runs forward again, with the weights of that time (the policy ``latest``, with recomputation), so no version is
kept for guests either. Their gradients are part of the update under way, which takes the mean over its own
micro-batches and them.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from noflush.order.actions import Op
from noflush.order.detours import Served
from noflush.replicas.door import KNOCK_S, PeerLine, Refused, knock
from noflush.replicas.labels import labels_of
from noflush.replicas.transport import State
from noflush.stage.channels import as_wire
from noflush.stage.detour import as_model
from noflush.stage.link import ACTIVATION, CONTROL, GRADIENT
from noflush.stage.meanwhile import Meanwhile
from noflush.stage.stage import Stage

logger = logging.getLogger("noflush")
_KEPT = 10_000


@dataclass
class Session:
    """One pipeline that is served.

    Attributes:
        key: of its group.
        above: line to the stage before the lost one.
        below: line to the one after it; None: the lost one is the last.
        wants: the first micro-batch whose forward the stage after has not had.
        phase: micro-batches m with m % K equal to this end a batch.
        inputs: of each micro-batch under way what came from above: tensors as they travel.
        ready: micro-batches whose gradients have come from below.
        labels: of each micro-batch under way, where the lost stage is the last.
        losses: of the batch under way there, as the stage's `Work` keeps them; ``counted``: of how many micro-batches.
        random: what forwards drew from, for the backwards to draw the same.
        ending: whether the stage after has gone; if it has sent all that is needed, the rest is done first.
    """

    key: str
    above: PeerLine
    below: PeerLine | None = None
    wants: int = 0
    phase: int = 0
    inputs: dict[int, Sequence[Tensor]] = field(default_factory=dict)
    ready: set[int] = field(default_factory=set)
    labels: dict[int, Any] = field(default_factory=dict)
    losses: Any = None
    counted: int = 0
    random: dict[int, Any] = field(default_factory=dict)
    ending: bool = False
    over: bool = False


class Guests:
    """Of one stage.

    Args:
        stage: that serves.
        say: tells the user a line.

    Attributes:
        served: the newest 10 000 pieces of work.
        micro_batches: guests whose gradients went into updates here.
    """

    def __init__(self, stage: Stage, say: Callable[[str], None]) -> None:
        self._stage, self._say = stage, say
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._todo: deque[tuple[Session, str, int, Sequence[Tensor]]] = deque()
        self._sessions: list[Session] = []
        self._own = 0
        self._turn = False
        self._piece_s = 0.0
        self.served: deque[Served] = deque(maxlen=_KEPT)
        self.micro_batches = 0
        assert stage.runner.neighbours.attention is not None
        stage.runner.neighbours.attention.wait = Meanwhile(self._work_until, self._wake).wait
        self._last = stage.stage == stage.schedule.stages - 1

    # ---- whom to serve -----------------------------------------------------------------------------------

    def answer(self, question: dict[str, Any], above: PeerLine) -> State:
        """Takes a pipeline in; asked by its stage before the lost one.

        Raises Refused where this stage's micro-batches are others, OSError where the stage after is not reached.
        """
        stage = self._stage
        incoming, outgoing = stage.runner.specs
        if incoming is None or (outgoing is None and not self._last):
            raise Refused("it has not begun to train")
        mine = {"stage": stage.stage, "gas": stage.schedule.gas, "spec": incoming.to_words()}
        other = next((name for name, value in mine.items() if question[name] != value), None)
        if other is not None:
            raise Refused(f"{other} is {mine[other]} there and {question[other]} here")
        session = Session(question["key"], above, phase=question["phase"])
        if outgoing is not None:
            words = {"kind": "stand-in", "key": session.key, "stage": stage.stage, "first": question["first"]}
            below, (_, answer) = knock(question["below"], {**words, "spec": outgoing.to_words()}, KNOCK_S)
            session.below, session.wants = below, answer["wants"]
            below.use(lambda *message: self._from_below(session, *message), lambda: self._below_gone(session))
        head, offset = question["head"], question["offset"]

        def from_above(kind: str, number: int, tensors: Sequence[Tensor], words: Sequence[int]) -> None:
            if kind == ACTIVATION and self._last:
                try:
                    session.labels[number] = labels_of(head, number + offset, stage.device, KNOCK_S)
                except (Refused, OSError) as why:
                    self._say(f"groups: no labels of micro-batch {number} of {session.key}: {why}")
                    self._end(session)
                    return
            self._from_above(session, kind, number, tensors, words)

        above.use(from_above, lambda: self._end(session))
        with self._lock:
            self._sessions.append(session)
        if session.below is not None:
            session.below.begin()
        name = session.key.rpartition("/")[0]
        self._say(f"groups: stage {stage.stage} serves {name}'s too, from micro-batch {question['first']} on")
        return {}, {}

    def _from_above(
        self, session: Session, kind: str, number: int, tensors: Sequence[Tensor], words: Sequence[int]
    ) -> None:
        if kind == CONTROL and session.below is not None:
            session.below.send(kind, number, words=words)
        elif kind == ACTIVATION:
            self._put(session, kind, number, tensors)

    def _from_below(
        self, session: Session, kind: str, number: int, tensors: Sequence[Tensor], words: Sequence[int]
    ) -> None:
        if kind == GRADIENT:
            self._put(session, kind, number, tensors)

    def _put(self, session: Session, kind: str, number: int, tensors: Sequence[Tensor]) -> None:
        with self._lock:
            if session.over:
                return
            if kind == ACTIVATION:
                session.inputs[number] = tensors
            else:
                session.ready.add(number)
            self._todo.append((session, kind, number, tensors))
            self._news.notify_all()
            hopeless = session.ending and kind == ACTIVATION
        if hopeless:
            self._end(session)

    def _below_gone(self, session: Session) -> None:
        """A pipeline that has come to its end parts from below: what has arrived is to be finished all the same."""
        with self._lock:
            session.ending = True
            lost = any(number not in session.ready for number in session.inputs)
        if lost or not session.inputs:
            self._end(session)

    def _end(self, session: Session) -> None:
        with self._lock:
            was, session.over = session.over, True
            self._sessions = [one for one in self._sessions if one is not session]
            self._todo = deque(item for item in self._todo if item[0] is not session)
        if was:
            return
        session.above.close()
        if session.below is not None:
            session.below.close()
        self._say(f"groups: {session.key.rpartition('/')[0]} is not served any more")

    def close(self) -> None:
        """Serves nobody any more."""
        for session in list(self._sessions):
            self._end(session)

    # ---- work --------------------------------------------------------------------------------------------

    def after_compute(self, op: Op) -> None:
        """After each of the stage's own forwards and backwards: one guest's turn."""
        self._own += 1
        if op is Op.BACKWARD or (op is Op.FORWARD and not self._last):  # a last stage's turn is both at once
            self._turn = not self._serve_one()

    def _work_until(self, over: Callable[[], bool]) -> None:
        """While the stage waits for something of its own, which may depend on just this work.

        A turn that was not used is taken at once; more than that only where nothing of its own comes for as long as a
        piece of work takes, or guests would get more of the stage than its own pipeline.
        """
        since = time.monotonic()
        while not over():
            patience = 0.0 if self._turn else self._piece_s - (time.monotonic() - since)
            if patience <= 0 and self._serve_one():
                self._turn, since = False, time.monotonic()
                continue
            with self._news:
                if not over():
                    self._news.wait(1.0 if self._ready() is None else max(patience, 1e-4))

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    def _serve_one(self) -> bool:
        """One piece of work; whether there was any."""
        while (item := self._next()) is not None:
            session, begun = item[0], time.monotonic()
            try:
                worked = self._do(*item)
            except Exception as error:  # a guest's harm is its own
                logger.exception("groups: serving %s failed", session.key)
                self._say(f"groups: serving {session.key.rpartition('/')[0]} failed: {type(error).__name__}: {error}")
                self._end(session)
                return True
            if session.ending and not session.inputs:
                self._end(session)
            if worked:
                self._piece_s = time.monotonic() - begun
                return True
        return False

    def _next(self) -> tuple[Session, str, int, Sequence[Tensor]] | None:
        with self._lock:
            at = self._ready()
            if at is None:
                return None
            item = self._todo[at]
            del self._todo[at]
            return item

    def _ready(self) -> int | None:
        """Which piece of work can be done; with the lock."""
        # A gradient may come before what it is of: its activation went both ways round the lost stage.
        return next(
            (i for i, item in enumerate(self._todo) if item[1] == ACTIVATION or item[2] in item[0].inputs), None
        )

    def _do(self, session: Session, kind: str, number: int, tensors: Sequence[Tensor]) -> bool:
        """Whether it was any work."""
        if session.below is None:
            self._train(session, number, tensors)
            return True
        if kind == ACTIVATION:
            if number >= session.wants:
                self._forward(session, number, tensors)
            return number >= session.wants
        self._backward(session, number, session.inputs[number], tensors)
        return True

    def _forward(self, session: Session, number: int, arrived: Sequence[Tensor]) -> None:
        begun = self._stage.recorder.begin(Op.FORWARD)
        with self._stage.work.replaying(), torch.no_grad():
            torch.manual_seed(_seed(session.key, number))
            session.random[number] = self._stage.work.random_state()
            outputs = self._run(arrived)
            coded = self._stage.runner.coded(divmod(number, self._stage.schedule.gas), outputs)
        assert session.below is not None
        session.below.send(ACTIVATION, number, [*map(_on_wire, coded), *arrived[self._inputs :]])
        self._note("F", session, number)
        self._stage.recorder.end(Op.FORWARD, number, begun)

    def _backward(self, session: Session, number: int, arrived: Sequence[Tensor], coming: Sequence[Tensor]) -> None:
        stage, runner = self._stage, self._stage.runner
        begun = stage.recorder.begin(Op.BACKWARD)
        with stage.work.replaying():
            if number in session.random:
                stage.work.set_random_state(session.random.pop(number))
            self._run(arrived)
            specs = runner.gradient_specs()
            came = [as_model(t, spec).to(stage.device) for t, spec in zip(coming, specs, strict=False)]
            gradients, rest = runner.received_gradients([*came, *coming[len(came) :]])
            stage.work.backward(self._buffer, gradients)
            self._send_back(session, number, list(rest))
        stage.recorder.end(Op.BACKWARD, number, begun)

    def _train(self, session: Session, number: int, arrived: Sequence[Tensor]) -> None:
        """At a last stage: forward, loss and backward at once, as such a stage does; and the report of a batch."""
        stage = self._stage
        begun = stage.recorder.begin(Op.BACKWARD)
        own = stage.work.take_losses()
        try:
            stage.work.put_losses(session.losses)
            with stage.work.replaying():
                torch.manual_seed(_seed(session.key, number))
                self._run(arrived, (None, session.labels.pop(number)))
                stage.work.backward(self._buffer, None)
                session.counted += 1
                report = []
                if number % stage.schedule.gas == session.phase:
                    # Of a batch that was begun elsewhere only these are known: their mean.
                    losses = stage.work.batch_losses() * (stage.schedule.gas / session.counted)
                    report, session.counted = [stage.reports.first(losses, 1.0)], 0
                self._send_back(session, number, report)
            session.losses = stage.work.take_losses()
        finally:
            stage.work.put_losses(own)
        stage.recorder.end(Op.BACKWARD, number, begun)

    def _send_back(self, session: Session, number: int, rest: list[Tensor]) -> None:
        stage = self._stage
        found = stage.work.input_gradients(self._buffer)
        gradients = stage.runner.coded_gradients(divmod(number, stage.schedule.gas), found, rest)
        session.above.send(GRADIENT, number, [_on_wire(t) for t in gradients])
        with self._lock:
            del session.inputs[number]
            session.ready.discard(number)
        stage.guests += 1
        self.micro_batches += 1
        self._note("B", session, number)

    def _run(self, arrived: Sequence[Tensor], batch: Any = None) -> Any:
        """Forward with the newest weights."""
        stage = self._stage
        stage.ring.bind_newest()
        stage.work.reserve(self._buffer + 1)
        specs = stage.runner.activation_specs()
        inputs = [as_model(t, spec).to(stage.device) for t, spec in zip(arrived, specs, strict=False)]
        return stage.work.forward(self._buffer, stage.runner.received(inputs), batch)

    @property
    def _buffer(self) -> int:
        """Behind those of the stage's own micro-batches."""
        return self._stage.schedule.in_flight(self._stage.stage)

    @property
    def _inputs(self) -> int:
        """Tensors of an activation message that are this stage's input; others are passed on."""
        incoming, _ = self._stage.runner.specs
        assert incoming is not None
        return len(incoming.tensors)

    def _note(self, kind: str, session: Session, number: int) -> None:
        self.served.append(Served(kind, session.key, number, self._own))


def _on_wire(tensor: Tensor) -> Tensor:
    return as_wire(tensor.detach().resolve_conj().resolve_neg().contiguous())


def _seed(key: str, number: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{key}/{number}".encode(), digest_size=4).digest(), "little")
