"""A stage that no host drives: replicas, torch's own optimizers, clipping, data that end, another K; by the simulator.

One pipeline of noflush's own rule without any host installed is ``examples/bare_torch.py``, which tests/e2e runs.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from noflush.order.schedule import Schedule
from noflush.simulate import DelaySimulator
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc
WIDTH, CALLS = 8, 8


def layers(stages):
    torch.manual_seed(3)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(stages)]


def data(count, replica=0):
    draw = torch.Generator().manual_seed(10 + replica)
    make = lambda: torch.randn(4, WIDTH, generator=draw)  # noqa: E731
    return [(make(), make()) for _ in range(count)]


def nadamw(parameters):
    from noflush.methods import DelayAwareNAdamW

    return DelayAwareNAdamW(parameters, lr=1e-2)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def train(rank, stages, gas, replicas, make_optimizer, max_norm):
    from noflush.stage.plain import PlainStage

    pipelines = [list(range(r * stages, (r + 1) * stages)) for r in range(replicas)]
    module = layers(stages)[rank % stages]
    losses = []

    def loss_fn(outputs, labels):
        loss = nn.functional.mse_loss(outputs, labels)
        losses.append(loss.item())
        return loss

    optimizer = make_optimizer(module.parameters())
    stage = PlainStage(Schedule(stages, gas), module, loss_fn, optimizer, pipelines, max_norm)
    batches = iter(data(CALLS * gas, rank // stages))
    for _ in range(CALLS):
        stage.train_on(batches)
    stage.drain()
    assert stage.updates == stage.calls == CALLS
    return losses, [p.detach().clone() for p in module.parameters()], stage.batch_losses()


@pytest.mark.parametrize("make_optimizer", [nadamw, adamw])
@pytest.mark.parametrize(("replicas", "gas", "max_norm"), [(1, 2, 0.1), (2, 1, 0.0), (2, 2, 0.1)])
def test_a_plain_pipeline_is_the_simulators_to_the_bit(make_optimizer, replicas, gas, max_norm):
    stages = 2
    results = run_ranks(
        train, stages * replicas, stages=stages, gas=gas, replicas=replicas, make_optimizer=make_optimizer,
        max_norm=max_norm,
    )  # fmt: skip
    simulator = DelaySimulator(
        layers(stages), nn.functional.mse_loss, make_optimizer, Schedule(stages, gas), max_norm, replicas=replicas
    )
    expected = [[] for _ in range(replicas)]
    for batches in zip(*(data(CALLS * gas, r) for r in range(replicas)), strict=True):
        for kept, loss in zip(expected, simulator.train_replicas(batches), strict=True):
            kept.append(loss.item())
    for rank, (losses, weights, by_call) in enumerate(results):
        assert losses == (expected[rank // stages] if rank % stages == stages - 1 else [])
        for got, want in zip(weights, simulator.parameters(rank % stages).values(), strict=True):
            assert torch.equal(got, want)
        mean = [sum(sum(of[t * gas : (t + 1) * gas]) for of in expected) / gas / replicas for t in range(CALLS)]
        assert list(by_call) == list(range(1, CALLS + 1))
        assert list(by_call.values()) == pytest.approx(mean)


def ends_and_changes(rank, stages):
    from noflush.stage.intake import DataExhausted
    from noflush.stage.plain import PlainStage

    module = layers(stages)[rank]
    stage = PlainStage(Schedule(stages, 2), module, nn.functional.mse_loss, nadamw(module.parameters()))
    stream = data(12)
    for call in range(3):
        stage.train_on(iter(stream[2 * call : 2 * call + 2]))
    with pytest.raises(DataExhausted, match="after 1 of 2 micro-batches"):
        stage.train_on(iter(stream[6:7]))
    stage.train_on(iter(stream[7:8]))  # what was pulled is kept
    stage.change_gas(1)
    for batch in stream[8:]:
        stage.train_on(iter([batch]))
    stage.drain()
    return [p.detach().clone() for p in module.parameters()]


def test_data_that_end_and_another_k_lose_nothing():
    stages = 3
    results = run_ranks(ends_and_changes, stages, stages=stages)
    simulator = DelaySimulator(layers(stages), nn.functional.mse_loss, nadamw, Schedule(stages, 1))
    simulator.schedule = Schedule(stages, 2)  # built with room for the most versions
    for m, batch in enumerate(data(12)):
        if m == 8:
            simulator.drain()
            simulator.schedule = Schedule(stages, 1)
        simulator.train_micro_batch(*batch)
    for rank, weights in enumerate(results):
        for got, want in zip(weights, simulator.parameters(rank).values(), strict=True):
            assert torch.equal(got, want)
