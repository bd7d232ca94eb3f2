"""When each receive is posted: the other half of the order, on which freedom from deadlock rests on an accelerator.

Pure. A receive has two ends: it is *posted* (``PA``, ``PG``), and later *waited for* (``RA``, ``RG``). Posting is said
by index: ``PG7`` posts whatever is not posted yet up to gradient 7. Two ways:

``ahead``, for gloo, whose transfers run beside the host and only once their receive is posted: so many receives are
kept posted that a slow link's latency is not paid for every message. Activations are posted across calls and drains;
a gradient is never posted before its activation was sent, since it cannot come earlier.

``in_step``, for an accelerator, where a receive posted too early keeps the device busy with what may come only after
the host has gone on, and the host may stand still at any moment: a lazily loaded module, an allocator's retry, a
user's ``synchronize``, or one hardware queue for all streams. Both ends of a link start their messages in one and the
same order: a gradient's receive is posted just before the first activation that the stage below takes after it has
sent that gradient, and what it sends after its last one, at the call's end. Then even the strictest host, which waits
for everything it has started before it starts anything else, gets to the end (`deadlock.check_in_step` plays just
that). Since the host of an accelerator runs ahead of the device, no receive starts later than its message can come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from noflush.order.schedule import Action, Op, Schedule, with_communication

Posting = Literal["ahead", "in_step"]


def call_order(schedule: Schedule, posting: Posting, stage: int, call: int) -> list[Action]:
    """Everything ``stage`` does in one `train_batch` call, in order."""
    actions = with_communication(schedule.stages, schedule.call(stage, call))
    if posting == "ahead":
        return list(_ahead(schedule, stage, call, actions))
    return list(_in_step(schedule, stage, call, actions))


def drain_order(schedule: Schedule, posting: Posting, stage: int, calls: int) -> list[Action]:
    """Everything ``stage`` does to finish what is in flight after ``calls`` calls."""
    actions = with_communication(schedule.stages, schedule.drain(stage, calls))
    if posting == "ahead":
        return list(_ahead(schedule, stage, calls, actions))
    return list(_when_needed(stage, actions))


def kept_posted(schedule: Schedule, link: int) -> int:
    """Receives that ``ahead`` keeps posted on the link from stage ``link`` to the next, in either direction."""
    return schedule.lag_in_call(link) - schedule.lag_in_call(link + 1) + 1


def _ahead(schedule: Schedule, stage: int, call: int, actions: Sequence[Action]) -> Iterator[Action]:
    """``actions`` with receives kept posted; ``call`` calls were made before them."""
    kept_up = kept_posted(schedule, stage - 1) if stage > 0 else 0
    kept_down = kept_posted(schedule, stage) if stage < schedule.stages - 1 else 0
    sent = call * schedule.gas  # activations sent
    taken = max(0, sent - schedule.lag(stage))  # gradients taken
    posted = min(taken + kept_down, sent)
    for action in actions:
        if action.op is Op.SEND_ACTIVATION:
            sent = action.index + 1
            if posted < min(taken + kept_down, sent):
                posted = min(taken + kept_down, sent)
                yield Action(stage, Op.POST_GRAD, posted - 1)
        elif action.op is Op.RECV_ACTIVATION:
            yield Action(stage, Op.POST_ACTIVATION, action.index)
        yield action
        if action.op is Op.RECV_ACTIVATION:
            yield Action(stage, Op.POST_ACTIVATION, action.index + kept_up)
        elif action.op is Op.RECV_GRAD:
            taken = action.index + 1
            if posted < min(taken + kept_down, sent):
                posted = min(taken + kept_down, sent)
                yield Action(stage, Op.POST_GRAD, posted - 1)


def _in_step(schedule: Schedule, stage: int, call: int, actions: Sequence[Action]) -> Iterator[Action]:
    before: dict[int, int] = {}  # activation -> the last gradient that the stage below sends before it takes it
    newest = None
    if stage < schedule.stages - 1:
        for below in schedule.call(stage + 1, call):
            if below.op is Op.BACKWARD:
                newest = below.index
            elif below.op is Op.FORWARD and newest is not None:
                before[below.index] = newest
    posted = None
    for action in _when_needed(stage, actions):
        if action.op is Op.SEND_ACTIVATION and before.get(action.index, posted) != posted:
            posted = before[action.index]
            yield Action(stage, Op.POST_GRAD, posted)
        if action.op is Op.POST_GRAD:
            if posted is not None and action.index <= posted:
                continue
            posted = action.index
        yield action
    if newest is not None and (posted is None or newest > posted):
        yield Action(stage, Op.POST_GRAD, newest)


def _when_needed(stage: int, actions: Sequence[Action]) -> Iterator[Action]:
    post = {Op.RECV_ACTIVATION: Op.POST_ACTIVATION, Op.RECV_GRAD: Op.POST_GRAD}
    for action in actions:
        if action.op in post:
            yield Action(stage, post[action.op], action.index)
        yield action
