"""Where micro-batches come from: iterators that end, stages that disagree, replicas, shapes that change."""

from __future__ import annotations

import pytest
import torch

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc


def train_to_the_end_of_data(rank):
    from noflush.stage.intake import DataExhausted

    engine = t.build(2, t.ds_config(4, block={}))
    stream = t.data(4 * 3 + 2)
    it = iter(stream)
    seen = []
    for _ in range(3):
        engine.train_batch(it)
    try:
        engine.train_batch(it)
    except StopIteration as error:
        seen.append((type(error) is DataExhausted, str(error)))
    after_error = engine.global_steps
    # Nothing is lost: the two micro-batches that were pulled come first in the next call.
    engine.train_batch(iter(t.data(2, seed=4)))
    engine.drain()
    return seen, after_error, engine.global_steps, [p.detach().clone() for p in engine.module.parameters()]


def train_the_same_data_in_one_go(rank):
    engine = t.build(2, t.ds_config(4, block={}))
    it = iter(t.data(14) + t.data(2, seed=4))
    for _ in range(4):
        engine.train_batch(it)
    engine.drain()
    return [p.detach().clone() for p in engine.module.parameters()]


def test_data_that_ends_in_a_call_loses_nothing():
    ended = run_ranks(train_to_the_end_of_data, 2)
    whole = run_ranks(train_the_same_data_in_one_go, 2)
    for (seen, after_error, steps, weights), expected in zip(ended, whole, strict=True):
        assert seen[0][0]
        assert "ended in call 3 after 2 of 4 micro-batches" in seen[0][1]
        assert (after_error, steps) == (3, 4)
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def train_with_different_data_on_the_last_stage(rank):
    engine = t.build(2, t.ds_config(2, block={"peer_timeout_s": 20}))
    it = iter(t.data(8 if rank == 0 else 3))
    for _ in range(3):
        engine.train_batch(it)


def test_stages_that_disagree_about_data():
    first, last = run_ranks(train_with_different_data_on_the_last_stage, 2, expect_errors=True)
    assert last[0] == "PeerError"
    assert "last stage's data iterator ended after 1 micro-batches, the first stage's gave 2" in last[1]
    assert first[0] == "PeerError"


def train_with_a_short_last_batch(rank):
    engine = t.build(2, t.ds_config(1, block={"peer_timeout_s": 20}))
    engine.train_batch(iter(t.data(1)))
    engine.train_batch(iter(t.data(1, batch=2)))


def test_shape_that_changes():
    first, last = run_ranks(train_with_a_short_last_batch, 2, expect_errors=True)
    assert first[0] == "ValueError"
    assert "every micro-batch must have one shape; drop the last partial batch" in first[1]
    assert last[0] == "PeerError"


def train_two_pipelines(rank):
    engine = t.build(2, t.ds_config(2, block={}))
    replica = engine.grid.get_data_parallel_id()
    it = iter(t.data(16)[replica::2])
    losses = [engine.train_batch(it).item() for _ in range(4)]
    engine.drain()
    return engine.stage_id, losses, [p.detach().clone() for p in engine.module.parameters()]


def one_replica_runs_out(rank):
    from noflush.stage.intake import DataExhausted

    engine = t.build(2, t.ds_config(2, block={}))
    replica = engine.grid.get_data_parallel_id()
    it = iter(t.data(4 if replica == 0 else 7))
    engine.train_batch(it)
    engine.train_batch(it)
    try:
        engine.train_batch(it)
    except DataExhausted as error:
        message = str(error)
    engine.train_batch(iter(t.data(2, seed=3)))
    engine.drain()
    return message, engine.updates


def test_replicas_stop_together():
    for rank, (message, updates) in enumerate(run_ranks(one_replica_runs_out, 4)):
        assert f"after {0 if rank % 2 == 0 else 2} of 2 micro-batches" in message
        assert updates == 3


def test_two_replicas_of_two_stages():
    """Equal on both replicas; equal to one pipeline that saw both halves, within the reduction's rounding."""
    from noflush.order.schedule import Schedule
    from noflush.simulate import DelaySimulator

    torch.set_num_threads(1)
    results = run_ranks(train_two_pipelines, 4)
    # One micro-batch of both replicas' samples has the mean of their gradients.
    sim = DelaySimulator(t.split_by_blocks(t.layers(), 2), t.next_token_loss, t.torch_nadam, Schedule(2, 2))
    pairs = t.data(16)
    for a, b in zip(pairs[::2], pairs[1::2], strict=True):
        sim.train_micro_batch(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
    for stage in range(2):
        replicas = [weights for s, _, weights in results if s == stage]
        for a, b, want in zip(*replicas, sim.parameters(stage).values(), strict=True):
            assert torch.equal(a, b)
            assert torch.allclose(a, want, atol=2e-5)
    assert results[0][1][1:] == results[1][1][1:]
