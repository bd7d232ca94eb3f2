"""When things would happen: the schedule's actions played against a clock. Pure.

Used to predict utilisation before a run and to say what a trace would look like with a core for every stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from noflush.order.actions import COMPUTE, Op, with_communication
from noflush.order.one_f_one_b import compute_of_call
from noflush.order.policies import ceil_div
from noflush.order.schedule import Schedule


@dataclass(frozen=True)
class Cost:
    """What a micro-batch costs one stage, in seconds: forward, backward, and an update after every K of them."""

    forward: float
    backward: float
    update: float = 0.0


@dataclass(frozen=True)
class Link:
    """A link between neighbours: ``latency`` s one way, and s that one message keeps each direction busy.

    The next message of a direction starts when the one before it has left: ``down`` are activations, ``up`` gradients.
    """

    latency: float
    down: float = 0.0
    up: float = 0.0


@dataclass(frozen=True)
class Timing:
    """A schedule's steady state: seconds a call, and each stage's share of that time spent computing."""

    seconds_per_call: float
    utilisation: tuple[float, ...]


def play(schedule: Schedule, costs: Sequence[Cost], links: float | Sequence[Link] = 0.0) -> Timing:
    """Plays the schedule: a stage computes one thing at a time, and a message arrives when its `Link` has carried it.

    ``costs`` has one entry a stage; ``links`` one a link, or is the latency of all, which nothing else limits. The
    figures are taken over the last half of a run that is long compared to
    the time the pipeline takes to fill.
    """
    calls = 3 * (ceil_div(schedule.lag(0) + schedule.stages, schedule.gas) + 8)
    stages = range(schedule.stages)
    actions = [
        with_communication(schedule.stages, [a for t in range(calls) for a in compute_of_call(schedule, s, t)])
        for s in stages
    ]
    clock = [0.0] * schedule.stages
    at = [0] * schedule.stages
    sent: dict[tuple[Op, int, int], float] = {}
    between = [Link(links)] * (schedule.stages - 1) if isinstance(links, (int, float)) else links
    free: dict[tuple[Op, int], float] = {}  # when a stage's outgoing direction is free again
    # Ends of calls: the time at which each stage made its n-th forward of a batch's last micro-batch.
    ends: list[list[float]] = [[] for _ in stages]
    busy: list[list[float]] = [[] for _ in stages]
    spent = [0.0] * schedule.stages
    seconds = [{Op.FORWARD: c.forward, Op.BACKWARD: c.backward, Op.UPDATE: c.update} for c in costs]
    moved = True
    while moved:
        moved = False
        for s in stages:
            while at[s] < len(actions[s]):
                action = actions[s][at[s]]
                if action.op in (Op.RECV_ACTIVATION, Op.RECV_GRAD):
                    sender = s - 1 if action.op is Op.RECV_ACTIVATION else s + 1
                    arrival = sent.get((action.op, sender, action.index))
                    if arrival is None:
                        break
                    clock[s] = max(clock[s], arrival)
                elif action.op in COMPUTE:
                    clock[s] += seconds[s][action.op]
                    spent[s] += seconds[s][action.op]
                    if action.op is Op.UPDATE:
                        ends[s].append(clock[s])
                        busy[s].append(spent[s])
                else:
                    kind = Op.RECV_ACTIVATION if action.op is Op.SEND_ACTIVATION else Op.RECV_GRAD
                    link = between[s] if kind is Op.RECV_ACTIVATION else between[s - 1]
                    takes = link.down if kind is Op.RECV_ACTIVATION else link.up
                    free[kind, s] = max(clock[s], free.get((kind, s), 0.0)) + takes
                    sent[kind, s, action.index] = free[kind, s] + link.latency
                at[s] += 1
                moved = True
    made = min(map(len, ends))
    # Latency makes the beat irregular within one cycle of what is in flight: average over whole cycles.
    cycle = schedule.in_flight(0)
    window = made // 2 // cycle * cycle or made // 2
    first, last = made - 1 - window, made - 1
    period = (ends[0][last] - ends[0][first]) / (last - first)
    shares = tuple((busy[s][last] - busy[s][first]) / (ends[s][last] - ends[s][first]) for s in stages)
    return Timing(period, shares)
