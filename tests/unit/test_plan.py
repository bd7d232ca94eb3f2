"""The plan's numbers against closed forms, and the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from noflush.__main__ import main
from noflush.methods.price import StageShapes, price
from noflush.methods.table import METHODS, load
from noflush.order.communicators import GROUP_BYTES_ESTIMATE, LINK_BYTES_ESTIMATE, communicators
from noflush.order.depth import bound_of, choose_depth
from noflush.order.link_traffic import link_traffic
from noflush.order.plan import human_bytes, make_plan
from noflush.order.schedule import Schedule
from noflush.order.tied_traffic import ENOUGH, tied_traffic
from noflush.order.timing import Cost, Link, play
from noflush.order.wire_format import Wire


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
    extra = choose_depth(Schedule(8, 1), [cost] * 8, [Link(latency)] * 7).extra
    assert extra > 0
    assert make_plan(Schedule(8, 1, extra_in_flight=extra), cost=cost, links=latency).no_flush > 0.99
    assert make_plan(Schedule(8, 1), cost=cost, links=latency).no_flush < 0.8


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


def test_communicators_of_a_rank():
    """Two a link, and one for each way of grouping that has more than one rank."""
    alone, pair = communicators(0, 1), [communicators(s, 2) for s in range(2)]
    assert (alone.count, alone.bytes_estimate) == (0, 0)
    assert [(c.links, c.groups) for c in pair] == [(2, 2), (2, 2)]  # the world and the pipeline are two groups
    assert [communicators(s, 4).links for s in range(4)] == [2, 4, 4, 2]
    assert communicators(1, 4, data=2).groups == 3
    assert communicators(1, 4, data=2, tensor=2).groups == 4
    assert communicators(0, 1, data=8).count == 2
    assert communicators(1, 3).bytes_estimate == 4 * LINK_BYTES_ESTIMATE + 2 * GROUP_BYTES_ESTIMATE


def test_the_plan_says_them(capsys):
    assert main(["plan", "--stages", "5", "--data-parallel", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "5 at stages 0, 4 (about 512.0 MiB), 7 at stages 1-3 (about 640.0 MiB)" in out
    assert main(["plan", "--stages", "5", "--data-parallel", "2", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [row["communicators"] for row in stages] == [5, 7, 7, 7, 5]
    assert stages[1]["communicator_bytes"] == 640 * 2**20


def test_the_plan_refuses_no_replica(capsys):
    assert main(["plan", "--stages", "2", "--data-parallel", "0"]) == 2
    assert "--data-parallel 0" in capsys.readouterr().err


def test_a_muon_updates_share_is_the_closed_form():
    """(20 m + 10 m^2 / n) / (6 T) of forward and backward for m x n weights and T tokens."""
    found = price("DelayAwareMuon", StageShapes(((768, 3072),), 0), tokens=4096)
    assert found.update_share == pytest.approx((20 * 768 + 10 * 768**2 / 3072) / (6 * 4096))
    assert price("PipeDreamAdamW", StageShapes(((768, 3072),), 0), tokens=4096).update_share == 0


@pytest.mark.parametrize("estimate", ["second", "first"])
def test_operations_of_basis_rotation_are_those_that_torch_counts(estimate):
    """Of three updates, the last with new bases, after a first one. torch counts products, and no factorization."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    m, n, every = 12, 20, 3
    p = torch.nn.Parameter(torch.randn(m, n))
    optimizer = load("DelayAwareSOAP")([p], estimate=estimate, refresh_every=every)
    p.grad = torch.randn(m, n)
    for _ in range(every):
        optimizer.step()
    with FlopCounterMode(display=False) as counter:
        for _ in range(every):
            optimizer.step()
    factorizations = 8 / 3 * (m**3 + n**3)
    row = METHODS["DelayAwareSOAP"]
    expected = every * row.flops(m, n, row.values({"estimate": estimate, "refresh_every": every})) - factorizations
    assert counter.get_total_flops() == pytest.approx(expected)


PRICED = [(name, {}) for name in METHODS] + [("DelayAwareSOAP", {"estimate": "first"})]


@pytest.mark.parametrize(("name", "params"), PRICED)
def test_state_bytes_are_those_that_the_optimizer_has(name, params):
    import torch

    shapes, others = ((6, 4), (4, 8)), ((5,),)
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in (*shapes, *others)]
    optimizer = load(name)(weights, **params)
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = sum(
        t.numel() * 4
        for state in optimizer.state.values()
        for key, t in state.items()
        if key not in ("step", "mu_product")
    )
    found = price(name, StageShapes(shapes, 5), tokens=1, **params)
    assert found.state_bytes == held
    assert found.look_ahead_bytes == 4 * (24 + 32 + 5)
    assert price(name, StageShapes(shapes, 5), tokens=1, masters=True, **params).look_ahead_bytes == 0


def test_command_says_what_methods_cost_and_warns(capsys):
    sizes = ["--num-layers", "8", "--hidden-size", "1024", "--seq-length", "128"]
    assert main(["plan", "--stages", "2", "--gas", "16", *sizes]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "methods at stage 0, 2,048 tokens an update" in out
    assert "more than the 6% that the flush costs" in out
    assert main(["plan", "--stages", "8", "--gas", "1", *sizes, "--micro-batch-size", "64"]) == 0
    assert "that the flush costs" not in capsys.readouterr().out


def test_a_tied_embeddings_traffic_and_memory(capsys):
    """By hand: 1000 x 64 numbers of 4 bytes are 256,000; 2 x 100 x 64 of 4 are 51,200 a micro-batch, 4 a batch."""
    sizes = ["--num-layers", "4", "--hidden-size", "64", "--vocab-size", "1000", "--seq-length", "100"]
    sizes += ["--micro-batch-size", "2", "--gas", "4"]
    assert main(["plan", "--stages", "4", *sizes, "--tied", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tied"] == {"bytes": 256_000, "activation_bytes": 204_800, "share": 1.25, "enough_gas": 101}
    block = 12 * 64 * 64 + 13 * 64
    assert [row["parameters"] for row in found["stages"]] == [block + 1100 * 64, block, block, block + 2 * 64]
    assert main(["plan", "--stages", "4", *sizes, "--tied"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "each link carries 250.0 KiB more a batch, each way, 125.0% of the activations' 200.0 KiB; K = 101 makes" in out
    )
    assert "the last stage holds a copy and its gradient besides, 500.0 KiB (no moments); stages between as much" in out
    assert main(["plan", "--stages", "4", *sizes, "--gas", "101", "--tied", "--tensor-parallel", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "125.0 KiB more a batch, each way, 2.5% of the activations' 4.9 MiB the last" in out
    assert main(["plan", "--stages", "1", *sizes, "--tied", "--json"]) == 0
    assert "tied" not in json.loads(capsys.readouterr().out)
    assert main(["plan", "--stages", "2", "--parameters", "1e6", "--tied"]) == 2
    assert "--tied: what it adds follows from a GPT's sizes; give --num-layers" in capsys.readouterr().err


def test_the_smallest_k_is_the_first_under_the_share():
    for vocabulary, sequence in ((1000, 100), (1001, 100), (50304, 1024), (999, 100)):
        found = tied_traffic(vocabulary, 64, sequence, 1, 1, 2)
        least = found.enough_gas
        assert replace(found, gas=least).share < ENOUGH <= replace(found, gas=least - 1).share


def test_bytes_on_a_link():
    numbers = 2 * 1024 * 4096
    assert link_traffic(4096, 1024, 2, 2).down == link_traffic(4096, 1024, 2, 2).up == 2 * numbers
    coded = link_traffic(4096, 1024, 2, 4, Wire("int8", "int4"))
    assert (coded.down, coded.up) == (numbers * 33 // 32, numbers * 17 // 32)


def test_command_prints_what_links_carry(capsys):
    sizes = ["--stages", "2", "--num-layers", "2", "--hidden-size", "4096", "--micro-batch-size", "2"]
    assert main(["plan", *sizes, "--wire", "int8,int4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["link"] == {"down_bytes": 8650752, "up_bytes": 4456448}
    assert main(["plan", *sizes, "--wire", "int8"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "carries 8.2 MiB of activations a micro-batch down, and 8.2 MiB of gradients up" in said
    assert "model 32.0 MiB, bf16 16.0 MiB, int8 8.2 MiB, int4 4.2 MiB" in said
    for wrong in ("int2", "int8,int2", "int8,int8,int8"):
        assert main(["plan", *sizes, "--wire", wrong]) == 2
        assert f"--wire {wrong}" in capsys.readouterr().err


def smallest_by_trying(schedule, costs, links, most):
    """Every depth played, from none on."""
    took = [play(replace(schedule, extra_in_flight=e), costs, links).seconds_per_call for e in range(most + 1)]
    enough = max(bound_of(schedule, costs, links), min(took)) * 1.005
    return next(e for e, seconds in enumerate(took) if seconds <= enough)


@pytest.mark.parametrize(
    ("stages", "gas", "link"),
    [
        (2, 1, Link(0.5)),
        (4, 1, Link(0.05, 0.1, 0.1)),
        (4, 2, Link(0.3)),
        (6, 1, Link(0.05, 0.02, 0.01)),
        (4, 1, Link(0)),
    ],
)
def test_the_depth_chosen_is_the_smallest_that_is_enough_and_a_quarter_more(stages, gas, link):
    schedule, costs, links = Schedule(stages, gas), [Cost(0.04, 0.08)] * stages, [link] * (stages - 1)
    choice = choose_depth(schedule, costs, links, most=24)
    enough = smallest_by_trying(schedule, costs, links, 24)
    assert choice.extra == min(24, enough + -(-enough // 4))
    assert choice.after <= choice.bound * 1.005 < choice.before or choice.extra == 0
    assert choose_depth(schedule, costs, links, least=20, most=24).extra == 20
    # What the schedule has in flight already does not count.
    assert choose_depth(replace(schedule, extra_in_flight=3), costs, links, most=24) == choice


def test_one_slow_link_and_one_slow_stage_are_enough_to_choose_by():
    costs = [Cost(0.01, 0.02), Cost(0.02, 0.04), Cost(0.01, 0.02)]
    far = choose_depth(Schedule(3, 1), costs, [Link(0.001), Link(0.1)])
    near = choose_depth(Schedule(3, 1), costs, [Link(0.001), Link(0.001)])
    assert far.extra > near.extra
    assert far.bound == near.bound == pytest.approx(0.06)
    narrow = choose_depth(Schedule(3, 1), costs, [Link(0.001), Link(0.001, down=0.1)])
    assert narrow.bound == pytest.approx(0.1)
    assert narrow.after == pytest.approx(0.1, rel=0.005)


def test_a_depth_that_the_policy_cannot_have_is_not_chosen():
    schedule = Schedule(4, 4, weights="2bw")  # K >= lag: one more, and no more
    choice = choose_depth(schedule, [Cost(0.01, 0.02)] * 4, [Link(0.5)] * 3)
    assert choice.extra == 1
    assert choice.after > choice.bound


def test_a_choice_says_what_it_costs():
    said = str(choose_depth(Schedule(4, 1), [Cost(0.04, 0.08)] * 4, [Link(0.05, 0.1, 0.1)] * 3))
    assert "120.0 ms of compute a micro-batch at a stage, links of up to 50.0 ms one way and 100.0 ms a message" in said
    assert "12 more in flight, by prediction 120.0 ms a call (345.0 with none, 120.0 at any depth)" in said
    assert "[15, 10, 5, 0] updates in place of [3, 2, 1, 0]" in said
    assert "0 more in flight" in str(choose_depth(Schedule(4, 1), [Cost(0.04, 0.08)] * 4, [Link(0.0)] * 3))


def test_a_link_carries_one_message_at_a_time():
    """A direction that is busy longer than a stage computes sets the pace; the other direction is free meanwhile."""
    schedule, costs = Schedule(2, 1, extra_in_flight=20), [Cost(0.01, 0.02)] * 2
    assert play(schedule, costs, [Link(0.05, 0.1, 0.02)]).seconds_per_call == pytest.approx(0.1)
    assert play(schedule, costs, [Link(0.05, 0.02, 0.2)]).seconds_per_call == pytest.approx(0.2)
    assert play(schedule, costs, [Link(0.05)]).seconds_per_call == pytest.approx(0.03)


def test_command_counts_what_a_link_carries(capsys):
    """32 MiB a micro-batch each way: 268 ms at 1 Gbit/s, more than the 120 ms of compute; coded less."""
    sizes = ["--stages", "2", "--num-layers", "2", "--hidden-size", "4096", "--micro-batch-size", "2"]
    link = ["--forward-ms", "40", "--backward-ms", "80", "--link-mbit", "1000", "--link-latency-ms", "50"]

    def utilisation(*more):
        assert main(["plan", *sizes, *link, *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["utilisation"]["no_flush"]

    assert utilisation("--extra-in-flight", "20") == pytest.approx(0.120 / (8 * 2**25 / 1e9), rel=1e-3)
    assert utilisation("--extra-in-flight", "20", "--wire", "int8") == pytest.approx(1.0)
    assert main(["plan", *sizes, *link]) == 0
    assert "would hide its latency, at more delay; its bandwidth sets the pace" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["plan", *sizes, *link, "--wire", "int8"]) == 0
    assert "would hide it, at more delay" in " ".join(capsys.readouterr().out.split())
    for wrong in (["--link-mbit", "0"], ["--link-mbit", "-1"]):
        assert main(["plan", *sizes, *wrong]) == 2
        assert f"--link-mbit {wrong[1]}: it must be more than 0" in capsys.readouterr().err
    assert main(["plan", "--stages", "2", "--link-mbit", "80"]) == 2
    assert "give --num-layers and --hidden-size" in capsys.readouterr().err
