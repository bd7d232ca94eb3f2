"""What DeepSpeed resolves out of the config and its arguments, and what it would silently ignore."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc


def train_with_inferred_gas(rank):
    config = t.ds_config(4, block={})
    del config["gradient_accumulation_steps"]
    config["train_batch_size"] = 12
    engine = t.build(2, config)
    stream = iter(t.data(20))
    for _ in range(3):
        engine.train_batch(stream)
    return len(list(stream)), engine.updates


def test_update_interval_that_deepspeed_infers():
    """K follows from train_batch_size / (micro-batch size x replicas) where the JSON does not state it."""
    first, last = run_ranks(train_with_inferred_gas, 2)
    assert first == (8, 2)
    assert last == (8, 3)


def train_a_part_of_the_weights(rank, optimizer):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    module = PipelineModule(layers=t.layers(), num_stages=2, loss_fn=t.next_token_loss, partition_method="type:Block")
    left_out = [p for p in module.parameters() if p.dim() == 1]
    before = [p.detach().clone() for p in left_out]
    chosen = [p for p in module.parameters() if p.dim() > 1]
    engine, *_ = deepspeed.initialize(model=module, model_parameters=chosen, config=t.ds_config(1, optimizer, block={}))
    for pair in t.data(6):
        engine.train_batch(iter([pair]))
        assert all(torch.equal(p, q) for p, q in zip(left_out, before, strict=True))
    engine.drain()
    assert all(torch.equal(p, q) for p, q in zip(left_out, before, strict=True))


@pytest.mark.parametrize("optimizer", [t.NADAMW, t.ADAMW], ids=["ours", "torch's"])
def test_weights_no_optimizer_owns_stay_as_they_are(optimizer):
    run_ranks(train_a_part_of_the_weights, 2, optimizer=optimizer)


def initialize_without_a_pipeline(rank, block):
    import deepspeed

    config = t.ds_config(1, t.ADAMW, block)
    engine, *_ = deepspeed.initialize(model=nn.Linear(4, 4), config=config)
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    engine.backward(engine(torch.ones(3, 4)).sum())
    engine.step()
    return type(engine).__name__


def test_enabled_block_without_a_pipeline_module_is_refused_and_not_ignored():
    ((kind, message),) = run_ranks(initialize_without_a_pipeline, 1, expect_errors=True, block={})
    assert kind == "ConfigError"
    assert "the model is a Linear, which DeepSpeedEngine trains: it needs a deepspeed.pipe.PipelineModule" in message
    assert run_ranks(initialize_without_a_pipeline, 1, block={"enabled": False}) == ["DeepSpeedEngine"]
    assert run_ranks(initialize_without_a_pipeline, 1, block=None) == ["DeepSpeedEngine"]
