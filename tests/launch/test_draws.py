"""Weights are drawn by random numbers of their own: no generator knows afterwards that any were drawn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from noflush.launch.gpt.pipeline import SeededLayer


@pytest.fixture
def device(monkeypatch):
    """The generator of a made-up GPU, seeded and forked as torch's own."""
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 2,
        "get_rng_state": lambda number: {2: generator}[number].get_state(),
        "set_rng_state": lambda state, number: {2: generator}[number].set_state(state),
        "manual_seed_all": generator.manual_seed,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return generator


def test_a_gpus_generator_goes_on_where_it_stood(device):
    before, before_cpu = device.get_state(), torch.get_rng_state()
    drawn = SeededLayer(7, nn.Linear, 3, 5).build().weight
    assert torch.equal(device.get_state(), before)
    assert torch.equal(torch.get_rng_state(), before_cpu)
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(7)
        assert torch.equal(nn.Linear(3, 5).weight, drawn)


def test_what_a_gpu_draws_is_seeded_too(device):
    """By Transformer Engine, for one: a layer's weights are alike on every rank that builds it."""

    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = torch.rand(4, generator=device)

    first, second = SeededLayer(7, Drawn).build().values, SeededLayer(7, Drawn).build().values
    assert torch.equal(first, second)
    assert not torch.equal(first, SeededLayer(8, Drawn).build().values)


def test_without_a_gpu_none_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked"))
    before = torch.get_rng_state()
    assert torch.equal(SeededLayer(7, nn.Linear, 3, 5).build().weight, SeededLayer(7, nn.Linear, 3, 5).build().weight)
    assert torch.equal(torch.get_rng_state(), before)
