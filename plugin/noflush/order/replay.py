"""What is in flight between two calls, and how a run that resumes from a checkpoint puts it back. Pure.

A checkpoint taken between calls holds no activations. A stage's micro-batches in flight go forward again, each with the
version and the random numbers of its first forward; activations travel down for it, and whatever a stage below has in
flight, the stage above has too. Gradients that were sent and not yet taken cannot be computed anew (the versions that
they came from are gone), so their sender has kept them, and sends them again.
"""

from __future__ import annotations

from noflush.order.actions import Action, Op
from noflush.order.posting import Posting, kept_posted
from noflush.order.schedule import Schedule


def in_flight(schedule: Schedule, stage: int, calls: int) -> range:
    """Micro-batches that have gone forward at ``stage`` and not backward, after ``calls`` calls."""
    total = calls * schedule.gas
    return range(max(0, total - schedule.lag(stage)), total)


def gradients_on_the_way(schedule: Schedule, stage: int, calls: int) -> range:
    """Micro-batches whose gradients ``stage`` has sent and the stage above has not taken, after ``calls`` calls."""
    if stage == 0:
        return range(0)
    return range(in_flight(schedule, stage - 1, calls).start, in_flight(schedule, stage, calls).start)


def gradients_posted(schedule: Schedule, posting: Posting, stage: int, calls: int) -> int:
    """Up to how many gradients from the stage below have their receives posted, after ``calls`` calls."""
    total = calls * schedule.gas
    if stage == schedule.stages - 1:
        return 0
    if posting == "ahead":
        return min(in_flight(schedule, stage, calls).start + kept_posted(schedule, stage), total)
    return in_flight(schedule, stage + 1, calls).start


def breaks_a_batch(schedule: Schedule) -> bool:
    """Whether some stage stands between two calls within a batch, with its gradients partly summed."""
    return any(schedule.lag(stage) % schedule.gas for stage in range(schedule.stages))


def replay_order(schedule: Schedule, posting: Posting, stage: int, calls: int) -> list[Action]:
    """All that ``stage`` does to stand where it stood after ``calls`` calls.

    A SEND_GRAD here sends again what was kept.
    """
    below = in_flight(schedule, stage + 1, calls) if stage < schedule.stages - 1 else range(0)
    actions: list[Action] = []
    for m in in_flight(schedule, stage, calls):
        if stage > 0:
            actions += (Action(stage, Op.POST_ACTIVATION, m), Action(stage, Op.RECV_ACTIVATION, m))
        actions.append(Action(stage, Op.FORWARD, m))
        if m in below:
            actions.append(Action(stage, Op.SEND_ACTIVATION, m))
    posted = gradients_posted(schedule, posting, stage, calls)
    if posted > in_flight(schedule, stage, calls).start:
        actions.append(Action(stage, Op.POST_GRAD, posted - 1))
    actions += (Action(stage, Op.SEND_GRAD, m) for m in gradients_on_the_way(schedule, stage, calls))
    return actions
