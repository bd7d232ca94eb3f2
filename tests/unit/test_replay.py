"""What is in flight between two calls, and the order that puts it back: against a count of what the calls do."""

from __future__ import annotations

import itertools

import pytest

from noflush.order.actions import Op
from noflush.order.deadlock import program
from noflush.order.posting import call_order
from noflush.order.replay import breaks_a_batch, gradients_on_the_way, in_flight, replay_order
from noflush.order.schedule import Schedule

SCHEDULES = [
    *(
        Schedule(stages, gas, extra_in_flight=e)
        for stages, gas, e in itertools.product((1, 2, 3, 5), (1, 2, 4), (0, 3))
    ),
    Schedule(4, 4, weights="2bw"),
    Schedule(3, 2, "1f1b_flush"),
]
NAMES = [f"P{s.stages}-K{s.gas}-e{s.extra_in_flight}-{s.weights}-{s.name}" for s in SCHEDULES]


def done(schedule, posting, calls):
    """Of each stage how many of each kind of action ``calls`` calls have done, and up to where gradients are posted."""
    found = []
    for stage in range(schedule.stages):
        counts, posted = dict.fromkeys(Op, 0), 0
        for call in range(calls):
            for _, op, index in call_order(schedule, posting, stage, call):
                counts[op] += 1
                if op is Op.POST_GRAD:
                    posted = max(posted, index + 1)
        found.append((counts, posted))
    return found


@pytest.mark.parametrize("posting", ["ahead", "in_step"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_the_order_puts_every_stage_where_it_stood(schedule, posting):
    for calls in range(1, schedule.calls_until_alike + 1):
        stood = done(schedule, posting, calls)
        sent = [0] * schedule.stages  # activations that have come down each link, in the replay
        for stage, (counts, posted) in enumerate(stood):
            forwards, backwards = counts[Op.FORWARD], counts[Op.BACKWARD]
            assert in_flight(schedule, stage, calls) == range(backwards, forwards)
            taken = stood[stage - 1][0][Op.RECV_GRAD] if stage else backwards
            assert list(gradients_on_the_way(schedule, stage, calls)) == list(range(taken, counts[Op.SEND_GRAD]))
            order = replay_order(schedule, posting, stage, calls)
            of = lambda op, order=order: [index for _, o, index in order if o is op]  # noqa: E731
            assert of(Op.FORWARD) == list(range(backwards, forwards))
            # A link brings just what is run with it, in order, and needs nothing from below before it is sent.
            if stage > 0:
                assert of(Op.RECV_ACTIVATION) == of(Op.POST_ACTIVATION) == of(Op.FORWARD) == sent[stage - 1]
            sent[stage] = of(Op.SEND_ACTIVATION)
            assert of(Op.SEND_GRAD) == list(range(taken, counts[Op.SEND_GRAD]))
            kinds = [op for _, op, _ in order]
            down = {Op.POST_ACTIVATION, Op.RECV_ACTIVATION, Op.FORWARD, Op.SEND_ACTIVATION}
            assert set(kinds[: sum(kind in down for kind in kinds)]) <= down
            # Receives stand as the next call expects them; where none is posted beyond what is taken, none is.
            again = max([index + 1 for index in of(Op.POST_GRAD)], default=0)
            assert again == (posted if posted > backwards else 0)


@pytest.mark.parametrize(
    ("stages", "gas", "extra", "breaks"), [(4, 1, 0, False), (4, 2, 0, True), (2, 2, 1, False), (2, 2, 2, True)]
)
def test_whether_a_batch_is_partly_summed_between_calls(stages, gas, extra, breaks):
    schedule = Schedule(stages, gas, extra_in_flight=extra)
    assert breaks_a_batch(schedule) is breaks
    order = program(schedule)[:-1]
    partly = any(sum(a.op is Op.BACKWARD for column in order for a in column[stage]) % gas for stage in range(stages))
    assert partly is breaks
