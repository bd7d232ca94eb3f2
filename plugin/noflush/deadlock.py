"""Proof, before the first step, that an order of actions cannot deadlock and keeps its promises.

Pure. A *program* is what every stage does, cut into calls: ``program[call][stage]`` is a list of actions.
Between two calls every stage waits for all others (the strictest thing user code may do), sends never block,
a receive blocks until its message was sent. A failure draws the grid of calls with the bad action marked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from noflush.schedule import Action, Op, Schedule, with_communication

Program = Sequence[Sequence[Sequence[Action]]]
_SENDER_OF = {Op.RECV_ACTIVATION: (Op.SEND_ACTIVATION, -1), Op.RECV_GRAD: (Op.SEND_GRAD, +1)}
_NEEDS = {Op.BACKWARD: Op.FORWARD, Op.SEND_ACTIVATION: Op.FORWARD, Op.SEND_GRAD: Op.BACKWARD}


class ScheduleError(ValueError):
    """An order of actions that would deadlock, lose a micro-batch or use a wrong weight version."""


def program(schedule: Schedule) -> list[list[list[Action]]]:
    """Warm-up, steady calls and the drain of ``schedule``, with communication, for every stage.

    Long enough that stage 0 holds as many weight versions as it ever will.
    """
    calls = schedule.calls_to_prove
    stages = range(schedule.stages)
    body = [[schedule.call(s, t) for s in stages] for t in range(calls)]
    body.append([schedule.drain(s, calls) for s in stages])
    return [[with_communication(schedule.stages, actions) for actions in column] for column in body]


def prove(schedule: Schedule) -> None:
    """Raises ScheduleError unless ``schedule`` is free of deadlock and its weight versions fit their slots."""
    order = program(schedule)
    check_order(order)
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
