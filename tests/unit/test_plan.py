"""The plan's numbers against closed forms, and the command line."""

from __future__ import annotations

import json

import pytest

from noflush.__main__ import main
from noflush.plan import best_extra_in_flight, human_bytes, make_plan
from noflush.schedule import Schedule
from noflush.timing import Cost, play


@pytest.mark.parametrize("stages", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("gas", [1, 2, 4, 8])
def test_utilisation_is_the_textbooks(stages, gas):
    plan = make_plan(Schedule(stages, gas))
    assert plan.no_flush == pytest.approx(1.0)
    assert plan.flush == pytest.approx(gas / (gas + stages - 1))


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_latency_costs_what_design_says(stages):
    """2 (P-1-s) c / (P-s) a micro-batch with P-s in flight, worst at stage 0."""
    latency, cost = 0.1, Cost(1.0, 2.0)
    seconds = play(Schedule(stages, 1), [cost] * stages, latency).seconds_per_call
    assert seconds == pytest.approx(3.0 + 2 * (stages - 1) * latency / stages, rel=1e-6)


def test_extra_depth_hides_latency():
    cost, latency = Cost(1.0, 2.0), 0.5
    extra = best_extra_in_flight(8, 1, cost, latency)
    assert extra > 0
    assert make_plan(Schedule(8, 1, extra_in_flight=extra), cost=cost, latency=latency).no_flush > 0.99
    assert make_plan(Schedule(8, 1), cost=cost, latency=latency).no_flush < 0.8


def test_slowest_stage_sets_the_pace():
    timing = play(Schedule(3, 1), [Cost(1, 1), Cost(2, 2), Cost(1, 1)])
    assert timing.seconds_per_call == pytest.approx(4.0)
    assert timing.utilisation == pytest.approx((0.5, 1.0, 0.5))


def test_stash_bytes():
    plan = make_plan(Schedule(4, 1), parameters=[10, 10, 10, 10])
    assert [s.stash_bytes for s in plan.stages] == [120, 80, 40, 0]
    assert human_bytes(1536) == "1.5 KiB"


def test_command_prints_the_promised_json(capsys):
    assert main(["plan", "--stages", "8", "--gas", "1", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["stages"][0] | {"stage": 0, "delay": 7, "versions": 8, "in_flight": 8} == out["stages"][0]
    assert out["utilisation"] == {"no_flush": pytest.approx(1.0), "flush": pytest.approx(1 / 8)}


def test_command_prints_a_table(capsys):
    assert main(["plan", "--stages", "4", "--num-layers", "8", "--hidden-size", "64", "--link-latency-ms", "1"]) == 0
    out = capsys.readouterr().out
    assert "predicted utilisation" in out
    assert "--extra-in-flight" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "0"], "need stages >= 1"),
        (["--stages", "4", "--parameters", "1,2"], "2 parameter counts for 4 stages"),
        (["--stages", "4", "--parameters", "many"], "give numbers"),
        (["--stages", "4", "--num-layers", "6", "--hidden-size", "8"], "does not divide into 4 stages"),
        (["--stages", "4", "--num-layers", "8"], "belong together"),
        (["--stages", "4", "--weights", "2bw"], "raise gradient_accumulation_steps"),
        (["--stages", "4", "--forward-ms", "0"], "compute must take more than 0 ms"),
    ],
)
def test_wrong_sizes_are_one_line_and_status_2(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
