"""What passes between stages: any number of tensors of any kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc


class TupleIn(nn.Module):
    """tokens -> (activation, mask that is passed along, int positions, a float that needs no gradient)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 8)

    def forward(self, tokens):
        mask = tokens > 5
        return self.embed(tokens), mask, torch.arange(tokens.shape[1]), torch.full((2, 3), 0.5)


class TupleMiddle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, payload):
        x, mask, positions, half = payload
        # A second differentiable tensor from here on; the unused one below gets a zero gradient.
        return self.a(x) * mask.unsqueeze(-1) * half[0, 0], self.b(x) + positions.unsqueeze(-1), mask, x * 1.0


class TupleOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(12, 32)

    def forward(self, payload):
        x, y, mask, _ = payload
        return self.out(torch.cat([x, y], dim=-1)) * mask.unsqueeze(-1)


def tuple_layers():
    torch.manual_seed(11)
    return [TupleIn(), TupleMiddle(), TupleOut()]


def train_tuples(rank):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    module = PipelineModule(layers=tuple_layers(), num_stages=3, loss_fn=t.next_token_loss, partition_method="uniform")
    engine, *_ = deepspeed.initialize(model=module, config=t.ds_config(2, block={}))
    it = iter(t.data(12))
    for _ in range(6):
        engine.train_batch(it)
    engine.drain()
    return [p.detach().clone() for p in engine.module.parameters()]


def test_any_tensors_pass_between_stages():
    from noflush.order.schedule import Schedule
    from noflush.simulate import DelaySimulator

    torch.set_num_threads(1)
    results = run_ranks(train_tuples, 3)
    sim = DelaySimulator(tuple_layers(), t.next_token_loss, t.torch_nadam, Schedule(3, 2))
    for tokens, labels in t.data(12):
        sim.train_micro_batch(tokens, labels)
    for s in range(3):
        for got, want in zip(results[s], sim.parameters(s).values(), strict=True):
            assert torch.equal(got, want)
