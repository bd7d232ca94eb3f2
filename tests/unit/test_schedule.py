"""The schedule against the formulas of lag and delay, golden files, and a checker of every way to scramble it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noflush.order.accelerator import check_in_step
from noflush.order.actions import Action, Op, with_communication
from noflush.order.deadlock import check_order, check_retirement, check_versions, program, prove
from noflush.order.one_f_one_b import compute_of_call, compute_of_drain
from noflush.order.policies import ceil_div
from noflush.order.program import ScheduleError
from noflush.order.schedule import Schedule

GOLDEN = Path(__file__).parent / "golden"
CASES = [(p, k) for p in (1, 2, 4, 8) for k in (1, 2, 4)]


def as_text(schedule: Schedule) -> str:
    """Every stage's actions with communication: a line a stage, calls separated by bars, the drain last."""
    order = program(schedule)
    lines = [" | ".join(" ".join(map(str, call[s])) for call in order) for s in range(schedule.stages)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("stages", "gas"), CASES)
@pytest.mark.parametrize("name", ["1f1b_no_flush", "1f1b_flush"])
def test_golden(stages, gas, name):
    # To accept a change of schedule on purpose: NOFLUSH_WRITE_GOLDEN=1 python -m tests.unit.test_schedule
    golden = (GOLDEN / f"{name}_P{stages}_K{gas}.txt").read_text()
    assert as_text(Schedule(stages, gas, name)) == golden


@pytest.mark.parametrize(("stages", "gas"), CASES)
@pytest.mark.parametrize("name", ["1f1b_no_flush", "1f1b_flush"])
def test_golden_text_parses_back_and_is_free_of_deadlock(stages, gas, name):
    lines = (GOLDEN / f"{name}_P{stages}_K{gas}.txt").read_text().splitlines()
    rows = [[[Action.parse(word) for word in call.split()] for call in line.split("|")] for line in lines]
    order = [[row[t] for row in rows] for t in range(len(rows[0]))]
    assert order == program(Schedule(stages, gas, name))
    check_order(order)


def test_order_of_three_stages_by_hand():
    s = Schedule(3, 1)
    calls = [" ".join(str(a)[1:] for a in compute_of_call(s, 0, t)) for t in range(4)]
    assert calls == ["F0", "F1", "F2 B0 U0", "F3 B1 U1"]
    assert [str(a) for a in compute_of_call(s, 2, 0)] == ["2F0", "2B0", "2U0"]
    assert [str(a) for a in compute_of_drain(s, 0, 4)] == ["0B2", "0U2", "0B3", "0U3"]


@given(
    stages=st.integers(1, 12),
    gas=st.integers(1, 10),
    extra=st.integers(0, 6),
    name=st.sampled_from(["1f1b_no_flush", "1f1b_flush"]),
    weights=st.sampled_from(["stash", "latest", "2bw"]),
)
def test_design_formulas(stages, gas, extra, name, weights):
    flush = name == "1f1b_flush"
    try:
        schedule = Schedule(stages, gas, name, weights, 0 if flush else extra)
    except ValueError:
        assert weights == "2bw"
        return
    prove(schedule)
    lags = [schedule.lag(s) for s in range(stages)]
    assert lags == sorted(lags, reverse=True)
    assert lags[-1] == 0
    for s in range(stages):
        updates = 0
        for call in range(6):
            actions = compute_of_call(schedule, s, call)
            forwards = [a.index for a in actions if a.op is Op.FORWARD]
            assert forwards == list(range(call * gas, (call + 1) * gas))
            updates += sum(a.op is Op.UPDATE for a in actions)
            assert updates == max(0, (call + 1) * gas - schedule.lag(s)) // gas
        for m in range(6 * gas):
            if weights == "stash" and not flush:
                assert schedule.version(s, m) == max(0, m - lags[s]) // gas
            assert schedule.delay(s, m) >= 0
        if weights == "stash" and not flush:
            assert schedule.versions_alive(s) == ceil_div(lags[s], gas) + 1
            assert schedule.mean_delay(s) == pytest.approx(lags[s] / gas)
        if weights == "2bw" and not flush:
            assert schedule.mean_delay(s) == 1
        if flush:
            assert schedule.max_delay(s) == 0


def test_one_call_needs_nothing_of_a_later_one():
    for stages, gas in CASES:
        schedule = Schedule(stages, gas, extra_in_flight=2 if stages > 1 else 0)
        for call, column in enumerate(program(schedule)[:-1]):
            sent = {a for c in program(schedule)[: call + 1] for row in c for a in row}
            for row in column:
                for a in row:
                    if a.op is Op.RECV_GRAD:
                        assert Action(a.stage + 1, Op.SEND_GRAD, a.index) in sent
                    if a.op is Op.RECV_ACTIVATION:
                        assert Action(a.stage - 1, Op.SEND_ACTIVATION, a.index) in sent


def test_no_delay_means_the_twins_agree():
    for gas in (1, 3):
        ours, twin = Schedule(1, gas), Schedule(1, gas, "1f1b_flush")
        assert [compute_of_call(ours, 0, t) for t in range(4)] == [compute_of_call(twin, 0, t) for t in range(4)]


def test_2bw_needs_a_batch_as_long_as_the_lag():
    with pytest.raises(ValueError, match="raise gradient_accumulation_steps to 3"):
        Schedule(4, 2, weights="2bw")
    prove(Schedule(4, 3, weights="2bw"))


@pytest.mark.parametrize("text", ["F0", "2X3", "", "2F", "2F-1"])
def test_action_that_does_not_parse(text):
    with pytest.raises(ValueError, match="expected <stage>"):
        Action.parse(text)


def test_scrambled_schedule_is_refused_and_drawn():
    order = program(Schedule(4, 2))
    order[2][1][0], order[2][1][1] = order[2][1][1], order[2][1][0]
    with pytest.raises(ScheduleError, match=">>1"):
        check_order(order)


def test_receive_before_the_peer_can_send_is_a_deadlock():
    # Stage 0 waits for the gradient of micro-batch 0 in the call in which it sends its activation, stage 1 lags.
    first = with_communication(2, [Action(0, Op.FORWARD, 0), Action(0, Op.BACKWARD, 0)])
    second = with_communication(2, [Action(1, Op.FORWARD, 0)])
    later = with_communication(2, [Action(1, Op.BACKWARD, 0)])
    with pytest.raises(ScheduleError, match="deadlock in call 0: stage 0 waits for ever at 0RG0"):
        check_order([[first, second], [[], later]])


def test_every_adjacent_swap_that_changes_meaning_is_refused():
    # Swapping neighbours is harmless only if neither depends on the other; count that most swaps are caught.
    refused = harmless = 0
    for stage in range(3):
        for call in range(4):
            for i in range(len(program(Schedule(3, 1))[call][stage]) - 1):
                order = program(Schedule(3, 1))
                row = order[call][stage]
                pair = {row[i].op, row[i + 1].op}
                row[i], row[i + 1] = row[i + 1], row[i]
                try:
                    check_order(order)
                    check_versions(Schedule(3, 1), order)
                except ScheduleError:
                    refused += 1
                else:
                    harmless += 1
                    # A send may trade places with work that does not feed it; an update with communication.
                    assert pair & {Op.SEND_ACTIVATION, Op.SEND_GRAD, Op.UPDATE, Op.RECV_GRAD}
    assert refused > harmless


@pytest.mark.parametrize("seed", range(25))
def test_lost_action_is_refused(seed):
    draw = random.Random(seed)
    schedule = Schedule(draw.randint(2, 5), draw.randint(1, 3))
    order = program(schedule)
    call, stage = draw.randrange(len(order)), draw.randrange(schedule.stages)
    row = [a for a in order[call][stage] if a.op is not Op.UPDATE]
    if not row:
        row = order[0][0]
        call, stage = 0, 0
    order[call][stage].remove(draw.choice(row))
    with pytest.raises(ScheduleError):
        check_order(order)


def test_too_few_versions_are_refused():
    schedule = Schedule(4, 1)
    fewer = Schedule(3, 1)

    class Pinched(Schedule):
        def versions_alive(self, stage):
            return fewer.versions_alive(max(0, stage - 1))

    with pytest.raises(ScheduleError, match="keeps only"):
        check_versions(Pinched(4, 1), program(schedule))


def test_a_message_that_would_be_forgotten_before_it_is_taken_is_refused():
    schedule = Schedule(4, 2)
    order = program(schedule, "ahead")
    check_retirement(schedule, order)

    class Hasty(Schedule):
        def lag_in_call(self, stage):
            return super().lag_in_call(stage) - 1

    with pytest.raises(ScheduleError, match="would forget what it sent up to micro-batch"):
        check_retirement(Hasty(4, 2), order)
    row = order[0][2]  # a header that is read after the gradient that proves it was sent
    row.append(row.pop(row.index(Action(2, Op.RECV_HEADER, 0))))
    with pytest.raises(ScheduleError, match="after 1RG0"):
        check_retirement(schedule, order)


@pytest.mark.parametrize("posting", ["ahead", "in_step"])
@pytest.mark.parametrize("lost", [Op.SEND_HEADER, Op.SEND_SPEC])
def test_a_control_message_that_is_not_sent_is_a_deadlock(posting, lost):
    order = program(Schedule(3, 2), posting)
    row = order[0][1]
    row[:] = [action for action in row if action.op is not lost]
    check = check_order if posting == "ahead" else check_in_step
    with pytest.raises(ScheduleError, match="for ever at"):
        check(order)


def test_a_large_pipelines_fault_is_drawn_small():
    schedule = Schedule(64, 32)
    order = program(schedule)
    row = order[2][30]
    row[0], row[3] = row[3], row[0]
    with pytest.raises(ScheduleError, match="its input was not received") as refused:
        check_order(order)
    assert "stage 26" in str(refused.value)
    assert "stage 25" not in str(refused.value)
    assert len(str(refused.value)) < 10_000


if __name__ == "__main__":
    import os

    if os.environ.get("NOFLUSH_WRITE_GOLDEN"):
        for p, k in CASES:
            for n in ("1f1b_no_flush", "1f1b_flush"):
                (GOLDEN / f"{n}_P{p}_K{k}.txt").write_text(as_text(Schedule(p, k, n)))


ALIGNED = [(4, 1, 0, "stash"), (4, 1, 5, "stash"), (5, 2, 1, "stash"), (4, 3, 0, "2bw"), (1, 2, 0, "stash")]


@pytest.mark.parametrize(("stages", "gas", "extra", "weights"), ALIGNED)
def test_an_aligned_version_is_among_those_that_are_kept(stages, gas, extra, weights):
    schedule = Schedule(stages, gas, weights=weights, extra_in_flight=extra, aligned=True)
    plain = replace(schedule, aligned=False)
    most = max(schedule.versions_alive(s) for s in range(stages))
    assert most == max(plain.versions_alive(s) for s in range(stages))  # the stage that keeps most keeps no more
    for calls in range(20):
        made = [max(0, calls * gas - schedule.lag(s)) // gas for s in range(stages)]
        assert schedule.aligned_version(calls) == made[0] == min(made)
        for s in range(stages):
            # A ring of so many versions holds that one whichever was written last.
            assert made[s] - schedule.versions_alive(s) < made[0]


def test_the_live_weights_are_never_aligned():
    with pytest.raises(ValueError, match="'aligned': a stage keeps its newest weights alone"):
        Schedule(4, 1, weights="latest", aligned=True)
    Schedule(4, 1, "1f1b_flush", "latest", aligned=True)  # the twin has one version at every stage
