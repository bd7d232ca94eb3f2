"""When each receive is posted: the other half of the order, on which freedom from deadlock rests on an accelerator.

Pure. A receive has two ends: it is *posted* (``PA``, ``PG``), and later *waited for* (``RA``, ``RG``). Posting is said
by index: ``PG7`` posts whatever is not posted yet up to gradient 7. Two ways:

``ahead``, for gloo, whose transfers run beside the CPU and only once their receive is posted: so many receives are
kept posted that a slow link's latency is not paid for every message. Activations are posted across calls and drains;
a gradient is never posted before its activation was sent, since it cannot come earlier.

``in_step``, for an accelerator, where a receive posted too early keeps the device busy with what may come only after
the CPU has gone on, and the CPU may stand still at any moment: a lazily loaded module, an allocator's retry, a
user's ``synchronize``, or one hardware queue for all streams. Both ends of a link start their messages in one and the
same order: a gradient's receive is posted just before the first activation that the stage below takes after it has
sent that gradient, and what it sends after its last one, at the call's end. Then even the strictest CPU, which waits
for everything it has started before it starts anything else, gets to the end (`accelerator.check_in_step` plays just
that). Since the CPU runs ahead of the device, no receive starts later than its message can come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from noflush.order.actions import Action, Op, with_communication
from noflush.order.control import with_specs
from noflush.order.one_f_one_b import compute_of_call, compute_of_drain
from noflush.order.schedule import Schedule

Posting = Literal["ahead", "in_step"]


def posting_of(backend: str) -> Posting:
    """When receives are posted over torch.distributed's ``backend``."""
    return "ahead" if backend == "gloo" else "in_step"


def call_order(schedule: Schedule, posting: Posting, stage: int, call: int, agreed: bool = True) -> list[Action]:
    """Everything ``stage`` does in one `train_batch` call once it is open (`control.opening_order`), in order.

    ``agreed``: whether both ends of each link know already what activations are; else this call says so first.
    """
    actions = with_communication(schedule.stages, compute_of_call(schedule, stage, call))
    ordered = _ahead(schedule, stage, call, actions) if posting == "ahead" else _in_step(schedule, stage, call, actions)
    return list(ordered) if agreed else with_specs(ordered)


def drain_order(schedule: Schedule, posting: Posting, stage: int, calls: int) -> list[Action]:
    """Everything ``stage`` does to finish what is in flight after ``calls`` calls."""
    actions = with_communication(schedule.stages, compute_of_drain(schedule, stage, calls))
    if posting == "ahead":
        return _ahead(schedule, stage, calls, actions)
    return list(_when_needed(stage, actions))


def kept_posted(schedule: Schedule, link: int) -> int:
    """Receives that ``ahead`` keeps posted on the link from stage ``link`` to the next, in either direction."""
    return schedule.lag_in_call(link) - schedule.lag_in_call(link + 1) + 1


def _ahead(schedule: Schedule, stage: int, call: int, actions: Sequence[Action]) -> list[Action]:
    """``actions`` with receives kept posted; ``call`` calls were made before them."""
    kept_up = kept_posted(schedule, stage - 1) if stage > 0 else 0
    kept_down = kept_posted(schedule, stage) if stage < schedule.stages - 1 else 0
    sent = call * schedule.gas  # activations sent
    taken = max(0, sent - schedule.lag(stage))  # gradients taken
    posted = min(taken + kept_down, sent)
    out: list[Action] = []
    for action in actions:
        _, op, index = action
        if op is Op.RECV_ACTIVATION:
            out += (Action(stage, Op.POST_ACTIVATION, index), action)
            out.append(Action(stage, Op.POST_ACTIVATION, index + kept_up))
        elif op is Op.SEND_ACTIVATION:
            sent = index + 1
            if posted < min(taken + kept_down, sent):
                posted = min(taken + kept_down, sent)
                out.append(Action(stage, Op.POST_GRAD, posted - 1))
            out.append(action)
        else:
            out.append(action)
            if op is Op.RECV_GRAD:
                taken = index + 1
                if posted < min(taken + kept_down, sent):
                    posted = min(taken + kept_down, sent)
                    out.append(Action(stage, Op.POST_GRAD, posted - 1))
    return out


def _in_step(schedule: Schedule, stage: int, call: int, actions: Sequence[Action]) -> Iterator[Action]:
    before: dict[int, int] = {}  # activation -> the last gradient that the stage below sends before it takes it
    newest = None
    if stage < schedule.stages - 1:
        for below in compute_of_call(schedule, stage + 1, call):
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
