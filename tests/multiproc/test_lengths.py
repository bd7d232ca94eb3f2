"""Micro-batches of changing sequence length, as a curriculum makes them: refused at once, by name, on every rank."""

from __future__ import annotations

import pytest

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc
GPT = t.GPT | {"depth": 3}


def of_lengths(*lengths):
    return [
        (tokens[:, :length].contiguous(), labels[:, :length].contiguous())
        for length, (tokens, labels) in zip(lengths, t.data(len(lengths), gpt=GPT), strict=True)
    ]


def train(rank, before, after, drains, block):
    """Five calls of two micro-batches, until all stages work; then one whose second has another length."""
    engine = t.build(3, t.ds_config(2, block=block), gpt=GPT)
    data = iter(of_lengths(*[before] * 11, after))
    for call in range(6):
        if call == 5 and drains:
            engine.drain()
        engine.train_batch(data)


@pytest.mark.parametrize(
    ("before", "after", "drains", "block"),
    [
        (8, 12, False, {}),
        (12, 8, False, {}),
        pytest.param(8, 12, True, {}, marks=pytest.mark.slow),
        pytest.param(8, 12, False, {"schedule": "1f1b_flush"}, marks=pytest.mark.slow),
        pytest.param(8, 12, False, {"wire": "int8"}, marks=pytest.mark.slow),
    ],
    ids=["grows", "shrinks", "drained", "flush", "coded"],
)
def test_training(before, after, drains, block):
    first, *others = run_ranks(train, 3, expect_errors=True, before=before, after=after, drains=drains, block=block)
    assert first[0] == "ValueError"
    assert f"stage 0 made float32[3, {after}, 16] of micro-batch 11, but float32[3, {before}, 16] was" in first[1]
    assert "every micro-batch must have one shape; drop the last partial batch (drop_last=True) or pad" in first[1]
    assert [kind for kind, _ in others] == ["PeerError"] * 2


def evaluate(rank, lengths):
    engine = t.build(3, t.ds_config(1, block={}), gpt=GPT)
    data = iter(of_lengths(*[12] * 5))
    for _ in range(4):
        engine.train_batch(data)
    losses = [float(engine.eval_batch(iter(of_lengths(*some)), num_micro_batches=len(some))) for some in lengths]
    engine.train_batch(data)
    return losses


@pytest.mark.parametrize("lengths", [(8, 8, 12), pytest.param((12, 8, 8), marks=pytest.mark.slow)])
def test_an_evaluation(lengths):
    """DeepSpeed's own pipeline aborted the next stage's process, or left it the rest of the micro-batch before."""
    first, *others = run_ranks(evaluate, 3, expect_errors=True, lengths=[lengths])
    at, now = next((m, length) for m, length in enumerate(lengths) if length != lengths[0])
    assert first[0] == "ValueError"
    assert f"stage 0 made float32[3, {now}, 16] without gradient of micro-batch {at} of an eval_batch" in first[1]
    assert "drop the last partial batch (drop_last=True) or pad" in first[1]
    assert all(len(other) == 2 for other in others), "a process was aborted"


def test_evaluations_of_other_lengths_each():
    """What one call has is one length; the next one's, and training's, are others."""
    lengths = [(8, 8), (12, 12), (4,), (8, 8)]
    losses = run_ranks(evaluate, 3, lengths=lengths)[-1]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3
