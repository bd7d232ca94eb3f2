"""When receives are posted: on an accelerator no host can hang, however strictly it waits; on gloo as early as useful.

The strictest host and its proof are in `deadlock`. Here another model of the same rules is kept beside it: streams,
kernels that occupy the device until their other end has started, one hardware queue or many, and a synchronisation at
one point of one stage. What the proof lets pass must run in the model, and what hangs in the model must be refused.
"""

from __future__ import annotations

import itertools

import pytest

from noflush.order.accelerator import check_in_step
from noflush.order.actions import Action, Op, with_communication
from noflush.order.deadlock import check_order, check_posts, program, prove
from noflush.order.one_f_one_b import compute_of_call
from noflush.order.posting import call_order, drain_order, kept_posted
from noflush.order.program import ScheduleError
from noflush.order.schedule import Schedule

NAMES = ("1f1b_no_flush", "1f1b_flush")


def schedules(stages, gas_up_to, extras=(0, 1, 2, 3, 4)):
    for p, gas, name in itertools.product(stages, range(1, gas_up_to + 1), NAMES):
        for extra in extras if name == "1f1b_no_flush" else (0,):
            yield Schedule(p, gas, name, extra_in_flight=extra)


def words(actions):
    return " ".join(str(a)[1:] for a in actions)


def test_three_stages_by_hand():
    s = Schedule(3, 1)
    assert [words(call_order(s, "in_step", stage, 3)) for stage in range(3)] == [
        # Gradient 1 was sent before activation 3 is taken below, and gradient 2 after it: posted at the end.
        "F3 SA3 PG1 RG1 B1 U1 PG2",
        "PA3 RA3 F3 SA3 PG2 RG2 B2 SG2 U2 PG3",
        "PA3 RA3 F3 B3 SG3 U3",
    ]
    assert words(drain_order(s, "in_step", 0, 4)) == "PG2 RG2 B2 U2 PG3 RG3 B3 U3"
    assert [words(call_order(s, "ahead", stage, 3)) for stage in range(3)] == [
        "F3 SA3 RG1 PG3 B1 U1",  # two are kept posted, but none whose activation was not sent
        "PA3 RA3 PA5 F3 PG3 SA3 RG2 B2 SG2 U2",
        "PA3 RA3 PA5 F3 B3 SG3 U3",
    ]


def test_a_gradients_receive_is_posted_before_the_activation_that_follows_it_below():
    # K = 2: stage 1 sends gradient 0 after activation 1, at the end of call 0, gradient 1 between activations 2 and 3.
    assert words(call_order(Schedule(3, 2), "in_step", 0, 0)) == "F0 SA0 F1 SA1 PG0"
    order = words(call_order(Schedule(3, 2), "in_step", 0, 1)).split()
    assert order.index("SA2") < order.index("PG1") < order.index("SA3")


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 8, 12, 16])
def test_in_step_no_host_hangs(stages):
    for schedule in schedules([stages], 16):
        prove(schedule, "in_step")


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
def test_ahead_is_free_of_deadlock_on_gloo(stages):
    for schedule in schedules([stages], 6, extras=(0, 3)):
        check_order(program(schedule, "ahead"))


def as_it_was(schedule, stage, calls, ahead=None):
    """The order before `in_step`: after each message so many receives are posted, up to those of the same call."""
    keep_up = ahead or (kept_posted(schedule, stage - 1) if stage else 0)
    keep_down = ahead or (kept_posted(schedule, stage) if stage < schedule.stages - 1 else 0)
    columns, activations, gradients = [], 0, 0  # posted so far
    for call in range(calls):
        end, below = (call + 1) * schedule.gas, schedule.lag(min(stage + 1, schedule.stages - 1))
        column = []

        def post(op, posted, up_to, column=column):
            if up_to > posted:
                column.append(Action(stage, op, up_to - 1))
            return max(posted, up_to)

        taken = max(0, call * schedule.gas - schedule.lag(stage))
        for action in with_communication(schedule.stages, compute_of_call(schedule, stage, call)):
            if action.op is Op.RECV_ACTIVATION:
                activations = post(Op.POST_ACTIVATION, activations, action.index + 1)
            elif action.op is Op.RECV_GRAD:
                gradients = post(Op.POST_GRAD, gradients, action.index + 1)
            column.append(action)
            if action.op is Op.RECV_ACTIVATION:
                activations = post(Op.POST_ACTIVATION, activations, min(end, action.index + 1 + keep_up))
            elif action.op is Op.RECV_GRAD:
                taken = action.index + 1
                gradients = post(Op.POST_GRAD, gradients, min(end - below, taken + keep_down))
        if stage < schedule.stages - 1:
            gradients = post(Op.POST_GRAD, gradients, min(end - below, taken + keep_down))
        columns.append(column)
    return columns


def program_as_it_was(schedule, ahead=None):
    calls = schedule.calls_to_prove
    rows = [as_it_was(schedule, s, calls, ahead) for s in range(schedule.stages)]
    return [[row[t] for row in rows] for t in range(calls)]


@pytest.mark.parametrize(("stages", "gas"), [(2, 2), (4, 2), (4, 4), (8, 8), (4, 16)])
def test_the_proof_refuses_the_order_as_it_was(stages, gas):
    with pytest.raises(ScheduleError, match=r"on an accelerator, stage \d may stand still for ever at"):
        check_in_step(program_as_it_was(Schedule(stages, gas)))


@pytest.mark.parametrize("posting", ["ahead", "in_step"])
def test_a_receive_that_is_waited_for_before_it_is_posted_is_refused(posting):
    for wait, post in ((Op.RECV_ACTIVATION, Op.POST_ACTIVATION), (Op.RECV_GRAD, Op.POST_GRAD)):
        order = program(Schedule(3, 2), posting)
        check_posts(order)
        row = next(row for column in order for row in column if any(a.op is wait for a in row))
        row[:] = [a for a in row if a.op is not post]
        with pytest.raises(ScheduleError, match="it was not posted"):
            check_posts(order)


def test_a_gradient_whose_activation_was_not_sent_cannot_be_posted():
    order = program(Schedule(3, 1), "ahead")
    row = order[3][0]
    at = next(i for i, a in enumerate(row) if a.op is Op.POST_GRAD)
    row[at] = Action(0, Op.POST_GRAD, row[at].index + 3)
    with pytest.raises(ScheduleError, match="its activation was not sent"):
        check_posts(order)


def test_the_twins_one_norm_is_a_collective_of_all_stages():
    for gas in (1, 2, 8):
        order = program(Schedule(4, gas, "1f1b_flush"), "in_step")
        check_in_step(order, one_norm=True)
    # Without a flush stages update at different times, and would wait for each other for ever.
    with pytest.raises(ScheduleError, match="on an accelerator"):
        check_in_step(program(Schedule(4, 1), "in_step"), one_norm=True)


def test_a_receive_that_is_never_posted_or_out_of_step_is_refused():
    for stage, call, post in ((1, 2, "PA"), (0, 2, "PG")):
        order = program(Schedule(3, 2), "in_step")
        row = order[call][stage]
        row[:] = [a for a in row if a.op.value != post]
        with pytest.raises(ScheduleError, match="on an accelerator"):
            check_in_step(order)


@pytest.mark.parametrize("gas", [1, 2])
def test_posting_before_one_is_needed_is_what_hangs(gas):
    """One receive more than in step, which has to wait for what the stage below makes of a later activation."""
    order = program(Schedule(3, gas), "in_step")
    check_in_step(order)
    row = order[3][0]
    first = next(i for i, a in enumerate(row) if a.op is Op.POST_GRAD)
    row[first] = Action(0, Op.POST_GRAD, row[first].index + 2)
    with pytest.raises(ScheduleError, match="on an accelerator"):
        check_in_step(order)


# ---- the other model: streams, kernels and queues ---------------------------------------------------------


def entries(actions):
    """(name, stream, what it waits for, message, seconds) of what a host enqueues for ``actions``, in order.

    Streams: c computes; four more carry messages, one a direction and end. A wait is an entry of c's. A forward takes
    1, a backward 2. A send waits for what c has been given so far; a receive, on a stream of its own, for nothing.
    """
    found, last = [], {}

    def add(name, stream, deps=(), message=None, seconds=0.0):
        deps = [d for d in (*deps, last.get(stream)) if d]
        last[stream] = name
        found.append((name, stream, deps, message, seconds))

    posted = {Op.POST_ACTIVATION: 0, Op.POST_GRAD: 0}
    for action in actions:
        s, i, op = action.stage, action.index, action.op
        if op in posted:
            kind, stream = ("a", "a in") if op is Op.POST_ACTIVATION else ("g", "g in")
            sender = s - 1 if kind == "a" else s + 1
            while posted[op] <= i:
                add(f"post {kind}{posted[op]}", stream, message=(kind, sender, posted[op]))
                posted[op] += 1
        elif op is Op.RECV_ACTIVATION:
            add(f"wait a{i}", "c", [f"post a{i}"])
        elif op is Op.RECV_GRAD:
            add(f"wait g{i}", "c", [f"post g{i}"])
        elif op is Op.SEND_ACTIVATION:
            add(f"send a{i}", "a out", [last["c"]], ("a", s, i))
        elif op is Op.SEND_GRAD:
            add(f"send g{i}", "g out", [last["c"]], ("g", s, i))
        else:
            add(str(action), "c", seconds={Op.FORWARD: 1.0, Op.BACKWARD: 2.0}.get(op, 0.0))
    return found


def play(rows, one_queue=False, synchronised=None):
    """End of every entry by stage and name; those that never end are missing.

    ``one_queue``: what cannot start yet holds up all that was enqueued after it. ``synchronised``: (stage, n): after
    its n-th entry the host waits for all before it.
    """
    start, end = [{} for _ in rows], [{} for _ in rows]
    ends_of = {}
    for s, row in enumerate(rows):
        for name, _, _, message, _ in row:
            if message:
                ends_of.setdefault(message, []).append((s, name))
    moved = True
    while moved:
        moved = False
        for s, row in enumerate(rows):
            before = 0.0
            for n, (name, _, deps, message, seconds) in enumerate(row):
                if synchronised == (s, n) and not all(e[0] in end[s] for e in row[:n]):
                    break
                if name in start[s]:
                    before = max(before, start[s][name])
                elif all(d in end[s] for d in deps):
                    start[s][name] = max([end[s][d] for d in deps] + ([before] if one_queue else []), default=0.0)
                    before, moved = max(before, start[s][name]), True
                    if not message:
                        end[s][name] = start[s][name] + seconds
                elif one_queue:
                    break
        for ends in ends_of.values():
            if len(ends) == 2 and all(name in start[s] for s, name in ends):
                done = max(start[s][name] for s, name in ends)
                for s, name in ends:
                    moved |= name not in end[s]
                    end[s].setdefault(name, done)
    return end


def rows_of(schedule, calls, how):
    if how == "in_step":
        orders = [[call_order(schedule, "in_step", s, t) for t in range(calls)] for s in range(schedule.stages)]
        for s, order in enumerate(orders):
            order.append(drain_order(schedule, "in_step", s, calls))
    else:
        orders = [as_it_was(schedule, s, calls) for s in range(schedule.stages)]
    return [entries([a for column in order for a in column]) for order in orders]


def unfinished(rows, end):
    return [(s, e[0]) for s, row in enumerate(rows) for e in row if e[0] not in end[s]]


@pytest.mark.parametrize(("stages", "gas", "extra"), [(2, 1, 0), (3, 2, 0), (4, 1, 2), (3, 4, 1), (4, 4, 0)])
def test_the_model_runs_to_its_end_in_step(stages, gas, extra):
    schedule = Schedule(stages, gas, extra_in_flight=extra)
    rows = rows_of(schedule, max(2, 8 // gas), "in_step")
    for one_queue in (False, True):
        assert unfinished(rows, play(rows, one_queue)) == []
    for s, row in enumerate(rows):
        for n in range(0, len(row), 3):  # every third point: the proof covers them all
            assert unfinished(rows, play(rows, True, (s, n))) == [], (s, row[n])


def test_the_model_hangs_where_the_order_as_it_was_did():
    rows = rows_of(Schedule(4, 4), 4, "as it was")
    hanging = [
        (s, n)
        for s, row in enumerate(rows)
        for n in range(0, len(row), 2)
        if unfinished(rows, play(rows, False, (s, n)))
    ]
    assert hanging  # some synchronisation inside a call
    assert unfinished(rows, play(rows, one_queue=True))  # and one hardware queue alone


@pytest.mark.parametrize(("stages", "gas", "extra"), [(2, 1, 0), (4, 1, 0), (8, 1, 0), (4, 4, 0), (4, 8, 0), (4, 1, 2)])
@pytest.mark.parametrize("one_queue", [False, True])
def test_in_step_costs_no_time(stages, gas, extra, one_queue):
    """Once full, a micro-batch takes its forward and backward, 3, at every stage: on many queues, and on one."""
    calls = max(4, 40 // gas)
    rows = rows_of(Schedule(stages, gas, extra_in_flight=extra), calls, "in_step")
    end = play(rows, one_queue)
    first, last = calls * gas // 2, calls * gas - 1
    for s in range(stages):
        took = (end[s][f"{s}F{last}"] - end[s][f"{s}F{first}"]) / (last - first)
        assert took == pytest.approx(3.0, rel=0.02)
