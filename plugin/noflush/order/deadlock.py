"""Proof, before the first step, that an order of actions cannot deadlock and keeps its promises.

Pure. A *program* is what every stage does, cut into calls: ``program[call][stage]`` is a list of actions.
Between two calls every stage waits for all others (the strictest thing user code may do). `check_order` plays it
as gloo does: sends never block, a receive blocks until its message was sent. `check_in_step` plays it as the
strictest accelerator would. A failure draws the grid of calls with the bad action marked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from noflush.order.posting import Posting, call_order, drain_order
from noflush.order.schedule import POSTS, Action, Op, Schedule, with_communication

Program = Sequence[Sequence[Sequence[Action]]]
_SENDER_OF = {Op.RECV_ACTIVATION: (Op.SEND_ACTIVATION, -1), Op.RECV_GRAD: (Op.SEND_GRAD, +1)}
_SENDS = {Op.SEND_ACTIVATION: (Op.POST_ACTIVATION, +1), Op.SEND_GRAD: (Op.POST_GRAD, -1)}
_POSTED_FROM = {Op.POST_ACTIVATION: (Op.SEND_ACTIVATION, -1), Op.POST_GRAD: (Op.SEND_GRAD, +1)}
_NEEDS = {Op.BACKWARD: Op.FORWARD, Op.SEND_ACTIVATION: Op.FORWARD, Op.SEND_GRAD: Op.BACKWARD}


class ScheduleError(ValueError):
    """An order of actions that would deadlock, lose a micro-batch or use a wrong weight version."""


def program(schedule: Schedule, posting: Posting | None = None) -> list[list[list[Action]]]:
    """Warm-up, steady calls and the drain of ``schedule``, with communication, for every stage; posts if asked for.

    Long enough that stage 0 holds as many weight versions as it ever will.
    """
    calls = schedule.calls_to_prove
    stages = range(schedule.stages)
    if posting is not None:
        body = [[call_order(schedule, posting, s, t) for s in stages] for t in range(calls)]
        return [*body, [drain_order(schedule, posting, s, calls) for s in stages]]
    body = [[schedule.call(s, t) for s in stages] for t in range(calls)]
    body.append([schedule.drain(s, calls) for s in stages])
    return [[with_communication(schedule.stages, actions) for actions in column] for column in body]


def prove(schedule: Schedule, posting: Posting = "ahead", replicas: int = 1, one_norm: bool = False) -> None:
    """Raises ScheduleError unless ``schedule`` is free of deadlock and its weight versions fit their slots.

    Args:
        schedule: what is to be run.
        posting: when receives are posted; ``in_step`` is proven under an accelerator's rules too.
        replicas: data-parallel pipelines, whose stages reduce their gradients with each other.
        one_norm: whether an update is a collective of all stages (tied layers, ``clip: global``).
    """
    order = program(schedule, posting)
    check_order(order)
    check_posts(order)
    if posting == "in_step":
        check_in_step(order, schedule.gas, replicas, one_norm)
    check_versions(schedule, order)


def check_order(order: Program) -> None:
    """Raises ScheduleError where a stage would wait for ever, act twice or out of order, or lose a message."""
    stages = len(order[0])
    done: list[set[tuple[Op, int]]] = [set() for _ in range(stages)]
    newest: dict[tuple[int, Op], int] = {}
    for call, column in enumerate(order):
        at = [0] * stages
        moved = True
        while moved:
            moved = False
            for stage in range(stages):
                while at[stage] < len(column[stage]):
                    action = column[stage][at[stage]]
                    if action.op in _SENDER_OF and not _sent(action, done):
                        break
                    if action.op in POSTS:
                        at[stage] += 1
                        moved = True
                        continue
                    _check_action(order, call, stage, at[stage], done, newest)
                    done[stage].add((action.op, action.index))
                    at[stage] += 1
                    moved = True
        stuck = [s for s in range(stages) if at[s] < len(column[s])]
        if stuck:
            stage = stuck[0]
            raise ScheduleError(
                f"deadlock in call {call}: stage {stage} waits for ever at {column[stage][at[stage]]}, "
                f"whose sender does not send it in this call or before\n" + draw(order, call, stage, at[stage])
            )
    _check_all_finished(order, done)


def check_posts(order: Program) -> None:
    """Raises ScheduleError where a receive is waited for that was not posted, or one posted that cannot come yet."""
    for stage in range(len(order[0])):
        posted = {Op.RECV_ACTIVATION: 0, Op.RECV_GRAD: 0}
        sent = 0
        for call, column in enumerate(order):
            for position, action in enumerate(column[stage]):
                why = None
                if action.op is Op.POST_ACTIVATION:
                    posted[Op.RECV_ACTIVATION] = max(posted[Op.RECV_ACTIVATION], action.index + 1)
                elif action.op is Op.POST_GRAD:
                    posted[Op.RECV_GRAD] = max(posted[Op.RECV_GRAD], action.index + 1)
                    why = "its activation was not sent, nor is it next" if action.index > sent else None
                elif action.op is Op.SEND_ACTIVATION:
                    sent = action.index + 1
                elif action.op in posted and action.index >= posted[action.op]:
                    why = "it was not posted"
                if why:
                    raise ScheduleError(f"{action} in call {call}: {why}\n" + draw(order, call, stage, position))


def check_in_step(order: Program, gas: int, replicas: int = 1, one_norm: bool = False) -> None:
    """Raises ScheduleError if a host that finishes all it has started before it starts anything else would hang.

    That host is the strictest an accelerator can have. A send and its receive are one kernel on either side, done when
    both have been started; they start in stream order; ``wait`` holds up the stream and not the host. Whatever else
    may come in between only makes a stage wait for things that it started *earlier*: a device-wide synchronisation
    at any point, on any number of stages at once; a full launch queue; all streams on one hardware queue
    (``CUDA_DEVICE_MAX_CONNECTIONS=1``), where what cannot start holds up what was started later. To wait for all of
    them each time is every such wait at once. Waits can only close a circle, never open one, so what gets to its
    end here gets there under any of them.

    Assumed: a kernel that is enqueued earlier gets its place on the device although a receive that was enqueued later
    occupies a few multiprocessors already. A cooperative kernel that needs all of them would be none.

    Args:
        order: a program of `call_order`'s, posts included.
        gas: K: the last backward of a batch at the last stage, and every update, is a collective of the replicas.
        replicas: pipelines that run ``order`` side by side.
        one_norm: an update is a collective of all stages of all replicas.
    """
    hosts = _StrictHosts(len(order[0]), gas, replicas, one_norm)
    for call, column in enumerate(order):
        stuck = hosts.play(column)
        if stuck is not None:
            stage, position = stuck
            raise ScheduleError(
                f"on an accelerator, stage {stage} may stand still for ever at {column[stage][position]} in call "
                f"{call}: if it waits for what it has started, in a device-wide synchronisation say, it waits for a "
                "message whose other end is started only later\n" + draw(order, call, stage, position)
            )


_Worker = tuple[int, int]  # replica, stage


class _StrictHosts:
    """One host a replica and stage; each finishes what it has started before it starts anything else."""

    def __init__(self, stages: int, gas: int, replicas: int, one_norm: bool) -> None:
        self._stages, self._gas, self._replicas, self._one_norm = stages, gas, replicas, one_norm
        self._workers = [(d, s) for d in range(replicas) for s in range(stages)]
        self._received = {(worker, op): 0 for worker in self._workers for op in POSTS}
        self._column: Sequence[Sequence[Action]] = ()
        self._at: dict[_Worker, int] = {}

    def play(self, column: Sequence[Sequence[Action]]) -> tuple[int, int] | None:
        """Plays one call: (stage, position) of one that stands still for ever, or None."""
        self._column = column
        self._at = dict.fromkeys(self._workers, 0)
        ready = list(self._workers)
        while ready:
            worker = ready.pop()
            while (action := self._head(worker)) is not None:
                moved = self._start(worker, action)
                if moved is None:
                    break
                ready += moved
        for worker, position in self._at.items():
            if position < len(column[worker[1]]):
                return worker[1], position
        return None

    def _head(self, worker: _Worker) -> Action | None:
        position = self._at.get(worker)
        if position is None or position >= len(self._column[worker[1]]):
            return None
        return self._column[worker[1]][position]

    def _start(self, worker: _Worker, action: Action) -> list[_Worker] | None:
        """Starts and finishes ``action``, or the next message of a post: who else has moved; None if it must wait."""
        replica, stage = worker
        if action.op in _SENDS:
            post, step = _SENDS[action.op]
            peer = (replica, stage + step)
            waits = self._head(peer)
            if waits is None or waits.op is not post or not self._received[peer, post] == action.index <= waits.index:
                return None
            self._received[peer, post] += 1
            self._at[worker] += 1
            return [peer]
        if action.op in POSTS and (index := self._received[worker, action.op]) <= action.index:
            send, step = _POSTED_FROM[action.op]
            peer = (replica, stage + step)
            if self._head(peer) != Action(stage + step, send, index):
                return None
            self._received[worker, action.op] += 1
            self._at[peer] += 1
            return [peer]
        peers = [worker]
        if self._is_collective(action):
            everybody = self._one_norm and action.op is Op.UPDATE
            peers = self._workers if everybody else [(d, stage) for d in range(self._replicas)]
            if any(self._head(peer) != Action(peer[1], action.op, action.index) for peer in peers):
                return None
        for peer in peers:
            self._at[peer] += 1
        return [peer for peer in peers if peer != worker]

    def _is_collective(self, action: Action) -> bool:
        ends_batch = (action.index + 1) % self._gas == 0
        reports = action.op is Op.BACKWARD and action.stage == self._stages - 1 and ends_batch
        return reports or action.op is Op.UPDATE


def _sent(action: Action, done: list[set[tuple[Op, int]]]) -> bool:
    op, step = _SENDER_OF[action.op]
    peer = action.stage + step
    return 0 <= peer < len(done) and (op, action.index) in done[peer]


def _check_action(
    order: Program,
    call: int,
    stage: int,
    position: int,
    done: list[set[tuple[Op, int]]],
    newest: dict[tuple[int, Op], int],
) -> None:
    action = order[call][stage][position]

    def fail(why: str) -> ScheduleError:
        return ScheduleError(f"{action} in call {call}: {why}\n" + draw(order, call, stage, position))

    if action.stage != stage:
        raise fail(f"it belongs to stage {action.stage} but stands in the row of stage {stage}")
    expected = newest.get((stage, action.op), -1) + 1
    if action.index != expected:
        raise fail(f"expected {Action(stage, action.op, expected)} next; one order holds on both ends of a link")
    newest[stage, action.op] = action.index
    needs = _NEEDS.get(action.op)
    if needs is not None and (needs, action.index) not in done[stage]:
        raise fail(f"it needs {Action(stage, needs, action.index)} first")
    if action.op is Op.FORWARD and stage > 0 and (Op.RECV_ACTIVATION, action.index) not in done[stage]:
        raise fail("its input was not received")
    if action.op is Op.BACKWARD and stage < len(done) - 1 and (Op.RECV_GRAD, action.index) not in done[stage]:
        raise fail("its gradient was not received")


def _check_all_finished(order: Program, done: list[set[tuple[Op, int]]]) -> None:
    for stage, actions in enumerate(done):
        forwards = {m for op, m in actions if op is Op.FORWARD}
        backwards = {m for op, m in actions if op is Op.BACKWARD}
        if forwards != backwards:
            missing = sorted(forwards ^ backwards)
            raise ScheduleError(f"stage {stage} never finishes micro-batches {missing}\n" + draw(order))
        for op, (sender, step) in _SENDER_OF.items():
            peer = stage + step
            if 0 <= peer < len(done):
                sent = {m for o, m in done[peer] if o is sender}
                received = {m for o, m in actions if o is op}
                if sent != received:
                    raise ScheduleError(
                        f"messages {sorted(sent - received)} from stage {peer} to stage {stage} are never received\n"
                        + draw(order)
                    )


def check_versions(schedule: Schedule, order: Program) -> None:
    """Raises ScheduleError if a forward's version would not exist, or more versions live than are kept."""
    for stage in range(schedule.stages):
        kept = schedule.versions_alive(stage)
        updates = 0
        held: dict[int, int] = {}
        needed: Counter[int] = Counter()  # version -> micro-batches in flight with it
        for call, column in enumerate(order):
            for position, action in enumerate(column[stage]):
                if action.op is Op.FORWARD:
                    version = schedule.version(stage, action.index)
                    if version > updates:
                        raise ScheduleError(
                            f"{action} wants version {version} but stage {stage} has made {updates} updates\n"
                            + draw(order, call, stage, position)
                        )
                    held[action.index] = version
                    needed[version] += 1
                elif action.op is Op.BACKWARD:
                    version = held.pop(action.index)
                    needed[version] -= 1
                    if not needed[version]:
                        del needed[version]
                elif action.op is Op.UPDATE:
                    updates += 1
                alive = 1 if schedule.weights == "latest" else len(needed) + (updates not in needed)
                if alive > kept:
                    raise ScheduleError(
                        f"stage {stage} needs versions {sorted({*needed, updates})} after {action}, but keeps only "
                        f"{kept}\n" + draw(order, call, stage, position)
                    )


def draw(order: Program, call: int | None = None, stage: int | None = None, position: int | None = None) -> str:
    """The grid of compute actions, a row a stage and a column a call, the bad action between ``>>`` and ``<<``."""

    def cell(t: int, s: int) -> str:
        words = []
        for i, action in enumerate(order[t][s]):
            bad = (t, s, i) == (call, stage, position)
            if bad:
                words.append(f">>{action}<<")
            elif action.op in (Op.FORWARD, Op.BACKWARD, Op.UPDATE):
                words.append(f"{action.op.value}{action.index}")
        return " ".join(words)

    cells = [[cell(t, s) for t in range(len(order))] for s in range(len(order[0]))]
    width = [max(len(row[t]) for row in cells) for t in range(len(order))]
    return "\n".join(
        f"stage {s:<3}| " + " | ".join(text.ljust(width[t]) for t, text in enumerate(row))
        for s, row in enumerate(cells)
    )
