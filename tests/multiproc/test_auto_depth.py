"""``extra_in_flight: "auto"``: every rank chooses one depth at one call, and goes on as the simulator that does so."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from noflush.order.link_traffic import LinkTraffic
from noflush.order.schedule import Schedule
from noflush.order.timing import Cost, Link
from noflush.order.wire_format import Wire
from noflush.simulate import DelaySimulator
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks
from tests.multiproc.slow_links import delayed

pytestmark = pytest.mark.multiproc
GPT = {"vocabulary": 32, "sequence": 12, "width": 16, "heads": 2, "depth": 12}
FORWARD_S, BACKWARD_S, LATENCY_S = 0.006, 0.012, 0.02
BYTES_PER_S = 2e5


class Sleep(torch.autograd.Function):
    """Time that compute takes; the numbers stay."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(FORWARD_S)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(BACKWARD_S)
        return grad.clone()


class Slow(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return Sleep.apply(self.layer(x))


def slow_layers(stages):
    """The test GPT, whose every stage takes its time."""

    def make(gpt):
        parts = t.split_by_blocks(t.layers(gpt), stages)
        for part in parts:
            block = next(i for i, layer in enumerate(part) if type(layer).__name__ == "Block")
            part[block].down = Slow(part[block].down)
        return [layer for part in parts for layer in part]

    return make


def train(rank, stages, gas, calls, wire):
    chosen = []

    def between(engine, call):
        chosen.append(engine.pipeline_stage.depth)
        if call == calls - 4:
            engine.eval_batch(iter(t.data(1, gpt=GPT, seed=9)), num_micro_batches=1)

    with delayed(LATENCY_S, BYTES_PER_S):
        block = {"extra_in_flight": "auto", "wire": wire}
        result = t.train(
            rank, stages, gas, calls, t.ds_config(gas, block=block), gpt=GPT, between=between,
            make_layers=slow_layers(stages),
        )  # fmt: skip
    at = next(call for call, depth in enumerate(chosen) if depth is not None)
    assert all(depth is chosen[at] for depth in chosen[at:])
    return result | {"depth": chosen[at], "at": at}


@pytest.mark.parametrize(
    ("stages", "gas", "wire", "replicas"), [(3, 1, "int8", 1), pytest.param(2, 2, "model", 2, marks=pytest.mark.slow)]
)
def test_ranks_choose_one_depth_and_go_on_as_the_simulator(stages, gas, wire, replicas):
    calls = 44 // gas
    results = run_ranks(train, stages * replicas, timeout=200, stages=stages, gas=gas, calls=calls, wire=wire)
    depth, at = results[0]["depth"], results[0]["at"]
    assert depth.extra > 0
    assert {(result["depth"].schedule, result["at"]) for result in results} == {(depth.schedule, at)}
    assert 0 < at < calls - 6
    for link in depth.links:
        assert LATENCY_S <= link.latency < 10 * LATENCY_S  # other processes may keep this machine busy
    for cost in depth.costs:
        assert cost.forward >= FORWARD_S
        assert cost.backward >= BACKWARD_S
    torch.set_num_threads(1)
    parts = t.split_by_blocks(slow_layers(stages)(GPT), stages)
    simulator = DelaySimulator(
        parts, t.next_token_loss, t.torch_nadam, Schedule(stages, gas), wire=Wire.read(wire), replicas=replicas
    )
    streams = [iter(t.data(calls * gas, gpt=GPT, seed=1 + 100 * r)) for r in range(replicas)]
    losses = [[] for _ in range(replicas)]
    for call in range(calls):
        if call == at:
            simulator.change_extra(depth.extra)
        for batches in itertools.islice(zip(*streams, strict=True), gas):
            for kept, loss in zip(losses, simulator.train_replicas(batches), strict=True):
                kept.append(loss.item())
    simulator.drain()
    weights = [list(simulator.parameters(s).values()) for s in range(stages)]
    for replica in range(replicas):
        t.assert_same(results[replica::replicas], losses[replica], weights)


def load_and_measure_again(rank, folder):
    engine = t.build(2, t.ds_config(1, block={"extra_in_flight": "auto"}))
    data = itertools.cycle(t.data(8))
    depths, losses = [], []

    def run():
        for _ in range(24):
            losses.append(engine.train_batch(data).item())
            depths.append(engine.pipeline_stage.depth)

    run()
    assert all(math.isfinite(loss) for loss in losses[1:])  # the change forgets none that was known
    engine.save_checkpoint(folder, tag="here")
    engine.load_checkpoint(folder, tag="here")
    run()
    engine.drain()
    different = [depth for depth, _ in itertools.groupby(depths, key=id)]
    return len(different), engine.updates


def changes(rank, stages):
    """Deeper, less deep, and another K, in a run without a host."""
    from noflush.stage.plain import PlainStage

    torch.manual_seed(3)
    parts = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(stages)]
    stage = PlainStage(Schedule(stages, 1), parts[rank], nn.functional.mse_loss, t.nadamw(parts[rank].parameters()))
    draw = torch.Generator().manual_seed(1)
    stream = iter([(torch.randn(4, 8, generator=draw), torch.randn(4, 8, generator=draw)) for _ in range(60)])
    for change in (None, ("extra", 5), ("extra", 2), ("gas", 2), ("extra", 6), ("extra", 0)):
        if change is not None:
            known = stage.loss
            {"extra": stage.change_extra, "gas": stage.change_gas}[change[0]](change[1])
            if change[0] == "extra":
                assert stage.loss.isfinite() or known.isnan()
        for _ in range(5):
            stage.train_on(stream)
    with pytest.raises(ValueError, match="extra_in_flight=-1"):
        stage.change_extra(-1)
    stage.drain()
    return [p.detach().clone() for p in parts[rank].parameters()], list(stage.batch_losses())


@pytest.mark.parametrize("stages", [2, 4])
def test_any_depth_after_any_other(stages):
    results = run_ranks(changes, stages, stages=stages)
    torch.manual_seed(3)
    parts = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(stages)]
    simulator = DelaySimulator(parts, nn.functional.mse_loss, t.nadamw, Schedule(stages, 1))
    draw = torch.Generator().manual_seed(1)
    stream = iter([(torch.randn(4, 8, generator=draw), torch.randn(4, 8, generator=draw)) for _ in range(60)])
    for change in (None, ("extra", 5), ("extra", 2), ("gas", 2), ("extra", 6), ("extra", 0)):
        if change is not None:
            {"extra": simulator.change_extra, "gas": simulator.change_gas}[change[0]](change[1])
        for _ in range(5 * simulator.schedule.gas):
            simulator.train_micro_batch(*next(stream))
    simulator.drain()
    for rank, (weights, steps) in enumerate(results):
        assert steps == list(range(1, 31))
        for got, want in zip(weights, simulator.parameters(rank).values(), strict=True):
            assert torch.equal(got, want)


def test_it_measures_again_after_a_checkpoint_was_loaded(tmp_path):
    for depths, updates in run_ranks(load_and_measure_again, 2, folder=str(tmp_path)):
        assert depths == 3  # none yet, that of the start, that after loading
        assert updates == 48


def probe(rank, stages, together):
    from noflush.stage.connect import connect
    from noflush.stage.link_probe import gather, measure

    neighbours = connect([list(range(stages))], rank, torch.device("cpu"), 60)
    above = LinkTraffic(2000, 4000) if rank else None
    below = LinkTraffic(2000, 4000) if rank < stages - 1 else None
    with delayed(LATENCY_S, 2e4):
        mine = measure(neighbours, above, below, torch.device("cpu"), rank, Cost(1.0, 2.0), together)
        return mine, gather(mine, stages)


@pytest.mark.parametrize("together", [True, False])
def test_links_are_what_they_are_made_to_be(together):
    """In turn a message also waits for the one before it to have gone on; together both ways wait for the slower."""
    results = run_ranks(probe, 3, stages=3, together=together)
    assert len({repr(agreed) for _, agreed in results}) == 1
    costs, links = results[0][1]
    assert costs == [Cost(1.0, 2.0)] * 3
    assert results[0][0].down == results[2][0].up == results[2][0].latency == 0.0
    for link in links:
        assert LATENCY_S <= link.latency < 10 * LATENCY_S
        assert 0.09 < link.down < 0.4
        assert 0.18 < link.up < 0.4


def test_of_all_ranks_figures_the_slowest_count():
    from noflush.stage.link_probe import Measured, merge

    first = Measured(0, Cost(1.0, 2.0, 0.1), 0.05, 0.0, 0.3)
    second = Measured(1, Cost(3.0, 1.0, 0.2), 0.0, 0.4, 0.0)
    other = [replace(first, cost=Cost(2.0, 1.0), latency=0.01, up=0.5), replace(second, down=0.1)]
    costs, links = merge([second, first, *other], 2)
    assert costs == [Cost(2.0, 2.0, 0.1), Cost(3.0, 1.0, 0.2)]
    assert links == [Link(0.05, down=0.4, up=0.5)]
