"""Proof, before the first step, that an order of actions cannot deadlock and keeps its promises.

Pure. Between two calls every stage waits for all others (the strictest thing user code may do). `check_order` plays a
program as gloo does: sends never block, a receive blocks until its message was sent. `accelerator.check_in_step` plays
it as the strictest accelerator would. A failure draws the calls and stages around the bad action.
"""

from __future__ import annotations

import gc
from collections import Counter

from noflush.order.accelerator import check_in_step
from noflush.order.actions import COMPUTE, POSTS, Action, Op, with_communication
from noflush.order.control import opening_order
from noflush.order.one_f_one_b import compute_of_call, compute_of_drain
from noflush.order.posting import Posting, call_order, drain_order
from noflush.order.program import Program, ScheduleError, draw
from noflush.order.retirement import retired_by
from noflush.order.schedule import Schedule

_SENDER_OF = {
    Op.RECV_ACTIVATION: (Op.SEND_ACTIVATION, -1),
    Op.RECV_GRAD: (Op.SEND_GRAD, +1),
    Op.RECV_HEADER: (Op.SEND_HEADER, -1),
    Op.RECV_SPEC: (Op.SEND_SPEC, -1),
}
_RECEIVER_OF = {sender: (receive, -step) for receive, (sender, step) in _SENDER_OF.items()}
_NEEDS = {Op.BACKWARD: Op.FORWARD, Op.SEND_ACTIVATION: Op.FORWARD, Op.SEND_GRAD: Op.BACKWARD}


def program(schedule: Schedule, posting: Posting | None = None) -> list[list[list[Action]]]:
    """Warm-up, steady calls and the drain of ``schedule``, with communication, for every stage.

    Long enough that every stage holds as many weight versions as it ever will. With ``posting`` all that a stage does,
    posts and the control messages too: long enough that every stage does the same in call after call.
    """
    stages = range(schedule.stages)
    if posting is None:
        body = compute_program(schedule)
        return [[with_communication(schedule.stages, actions) for actions in column] for column in body]
    calls = schedule.calls_until_alike
    order = [
        [opening_order(schedule.stages, s, t) + call_order(schedule, posting, s, t, agreed=t > 0) for s in stages]
        for t in range(calls)
    ]
    return [*order, [drain_order(schedule, posting, s, calls) for s in stages]]


def compute_program(schedule: Schedule) -> list[list[list[Action]]]:
    """As `program` without posts, and without messages."""
    calls, stages = schedule.calls_to_prove, range(schedule.stages)
    body = [[compute_of_call(schedule, s, t) for s in stages] for t in range(calls)]
    return [*body, [compute_of_drain(schedule, s, calls) for s in stages]]


def prove(schedule: Schedule, posting: Posting = "ahead", one_norm: bool = False) -> None:
    """Raises ScheduleError unless ``schedule`` is free of deadlock and its weight versions fit their slots.

    Takes time in proportion to the number of actions.

    Args:
        schedule: what is to be run.
        posting: when receives are posted; ``in_step`` is proven under an accelerator's rules too.
        one_norm: whether an update is a collective of all stages (tied layers, ``clip: global``).
    """
    # A large pipeline's order is half a million small tuples, in which the collector would look for cycles.
    collects = gc.isenabled()
    gc.disable()
    try:
        order = program(schedule, posting)
        check_order(order)
        check_posts(order)
        check_retirement(schedule, order)
        if posting == "in_step":
            check_in_step(order, one_norm)
        check_versions(schedule, compute_program(schedule))
    finally:
        if collects:
            gc.enable()


def check_order(order: Program) -> None:
    """Raises ScheduleError where a stage would wait for ever, act twice or out of order, or lose a message."""
    stages = len(order[0])
    # Of each stage and op how many are done: they come as 0, 1, 2, ...
    done = [dict.fromkeys(Op, 0) for _ in range(stages)]
    for call, column in enumerate(order):
        at = [0] * stages
        ready = list(range(stages))
        while ready:
            stage = ready.pop()
            row, counts, position = column[stage], done[stage], at[stage]
            for action in row[position:]:
                _, op, index = action
                if op in POSTS:
                    position += 1
                    continue
                if op in _SENDER_OF:
                    sender, step = _SENDER_OF[op]
                    if not 0 <= stage + step < stages or done[stage + step][sender] <= index:
                        break
                elif op in _RECEIVER_OF:
                    ready.append(stage + _RECEIVER_OF[op][1])
                if action.stage != stage or index != counts[op] or not _is_due(op, index, counts, stage, stages):
                    why = _what_is_wrong(action, counts, stage, stages)
                    raise ScheduleError(f"{action} in call {call}: {why}\n" + draw(order, call, stage, position))
                counts[op] = index + 1
                position += 1
            at[stage] = position
        for stage in range(stages):
            if at[stage] < len(column[stage]):
                raise ScheduleError(
                    f"deadlock in call {call}: stage {stage} waits for ever at {column[stage][at[stage]]}, "
                    f"whose sender does not send it in this call or before\n" + draw(order, call, stage, at[stage])
                )
    _check_all_finished(order, done)


def _is_due(op: Op, index: int, counts: dict[Op, int], stage: int, stages: int) -> bool:
    if op is Op.FORWARD:
        return stage == 0 or counts[Op.RECV_ACTIVATION] > index
    if op is Op.BACKWARD:
        return counts[Op.FORWARD] > index and (stage == stages - 1 or counts[Op.RECV_GRAD] > index)
    needs = _NEEDS.get(op)
    return needs is None or counts[needs] > index


def _what_is_wrong(action: Action, counts: dict[Op, int], stage: int, stages: int) -> str:
    of, op, index = action
    if of != stage:
        return f"it belongs to stage {of} but stands in the row of stage {stage}"
    if index != counts[op]:
        return f"expected {Action(stage, op, counts[op])} next; one order holds on both ends of a link"
    needs = _NEEDS.get(op)
    if needs is not None and counts[needs] <= index:
        return f"it needs {Action(stage, needs, index)} first"
    return "its input was not received" if op is Op.FORWARD else "its gradient was not received"


def _check_all_finished(order: Program, done: list[dict[Op, int]]) -> None:
    for stage, counts in enumerate(done):
        forwards, backwards = counts[Op.FORWARD], counts[Op.BACKWARD]
        if forwards != backwards:
            missing = list(range(min(forwards, backwards), max(forwards, backwards)))
            raise ScheduleError(f"stage {stage} never finishes micro-batches {missing}\n" + draw(order))
        for receive, (sender, step) in _SENDER_OF.items():
            peer = stage + step
            if 0 <= peer < len(done) and done[peer][sender] != counts[receive]:
                lost = Action(peer, sender, counts[receive])
                raise ScheduleError(f"stage {stage} never receives what {lost} sends\n" + draw(order))


def check_posts(order: Program) -> None:
    """Raises ScheduleError where a receive is waited for that was not posted, or one posted that cannot come yet."""
    for stage in range(len(order[0])):
        activations = gradients = sent = 0  # posted, posted, sent
        for call, column in enumerate(order):
            for position, (_, op, index) in enumerate(column[stage]):
                if op in COMPUTE:
                    continue
                why = None
                if op is Op.POST_ACTIVATION:
                    activations = max(activations, index + 1)
                elif op is Op.POST_GRAD:
                    gradients = max(gradients, index + 1)
                    why = "its activation was not sent, nor is it next" if index > sent else None
                elif op is Op.SEND_ACTIVATION:
                    sent = index + 1
                elif (op is Op.RECV_ACTIVATION and index >= activations) or (op is Op.RECV_GRAD and index >= gradients):
                    why = "it was not posted"
                if why:
                    action = column[stage][position]
                    raise ScheduleError(f"{action} in call {call}: {why}\n" + draw(order, call, stage, position))


def check_retirement(schedule: Schedule, order: Program) -> None:
    """Raises ScheduleError where a stage would forget a message that its receiver may not have taken (`retired_by`).

    What a message proves is what its sender had taken by then, in its own order.
    """
    stages, gas = len(order[0]), schedule.gas
    # By link and direction: what the sender had taken when it sent the message of an index.
    down: list[list[int]] = [[] for _ in range(stages)]
    up: list[list[tuple[int, int]]] = [[] for _ in range(stages)]
    for stage in range(stages):
        activations = gradients = headers = 0
        for column in order:
            for _, op, index in column[stage]:
                if op is Op.RECV_ACTIVATION:
                    activations = index + 1
                elif op is Op.SEND_GRAD:
                    up[stage].append((activations, headers))
                elif op is Op.SEND_ACTIVATION:
                    down[stage].append(gradients)
                elif op is Op.RECV_GRAD:
                    gradients = index + 1
                elif op is Op.RECV_HEADER or op is Op.RECV_SPEC:
                    headers += 1
    lags = [schedule.lag_in_call(stage) for stage in range(stages)]
    for call, column in enumerate(order):
        for stage, row in enumerate(column):
            for position, (_, op, index) in enumerate(row):
                if op is Op.RECV_ACTIVATION:
                    up_to = retired_by(op, index, lags[stage - 1])
                    safe = down[stage - 1][index] > up_to
                elif op is Op.RECV_GRAD:
                    up_to = retired_by(op, index, 0)
                    activations, headers = up[stage + 1][index]
                    safe = activations > up_to and headers > up_to // gas + 1  # of every call up to this one; the spec
                else:
                    continue
                if not safe:
                    raise ScheduleError(
                        f"after {row[position]} in call {call} stage {stage} would forget what it sent up to "
                        f"micro-batch {up_to}, which its receiver may not have taken\n"
                        + draw(order, call, stage, position)
                    )


def check_versions(schedule: Schedule, order: Program) -> None:
    """Raises ScheduleError if a forward's version would not exist, or more versions live than are kept."""
    live = schedule.backward_sees_live_weights
    for stage in range(schedule.stages):
        kept = schedule.versions_alive(stage)
        updates = 0
        held: dict[int, int] = {}
        needed: Counter[int] = Counter()  # version -> micro-batches in flight with it
        for call, column in enumerate(order):
            for position, action in enumerate(column[stage]):
                _, op, index = action
                if op not in COMPUTE:
                    continue
                if op is Op.FORWARD:
                    version = schedule.version(stage, index)
                    if version > updates:
                        raise ScheduleError(
                            f"{action} wants version {version} but stage {stage} has made {updates} updates\n"
                            + draw(order, call, stage, position)
                        )
                    held[index] = version
                    needed[version] += 1
                elif op is Op.BACKWARD:
                    version = held.pop(index)
                    needed[version] -= 1
                    if not needed[version]:
                        del needed[version]
                else:
                    updates += 1
                alive = 1 if live else len(needed) + (updates not in needed)
                if alive > kept:
                    raise ScheduleError(
                        f"stage {stage} needs versions {sorted({*needed, updates})} after {action}, but keeps only "
                        f"{kept}\n" + draw(order, call, stage, position)
                    )
