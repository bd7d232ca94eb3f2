"""A checkpoint disturbs nothing: a run that saves has the bits of one that does not, and so has one that resumes.

Dropout is on. The run that never saves is held to the simulator elsewhere (`test_exact`, `test_tied`); here it is the
oracle.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from noflush.demo.gpt import next_token_loss
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

MUON = {"type": "DelayAwareMuon", "params": {"lr": 3e-3, "look_ahead": 0.5}}
NAG = {"type": "DelayAwareNAG", "params": {"lr": 3e-3, "look_ahead": 0.5}}
WARM_UP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 20}}}
ZERO = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}


class Counting(nn.Module):
    """Dropout, and a buffer that counts the micro-batches that it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.dropout(x)


def with_dropout(gpt=None):
    return [nn.Sequential(layer, Counting()) if type(layer).__name__ == "Block" else layer for layer in t.layers(gpt)]


def build(stages, config, dp=1):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    losses = []

    def loss_fn(outputs, labels):
        loss = next_token_loss(outputs, labels)
        if torch.is_grad_enabled():
            losses.append(loss.item())
        return loss

    layers = with_dropout()
    module = PipelineModule(layers, num_stages=stages, loss_fn=loss_fn, partition_method="type:Sequential")
    engine, *_ = deepspeed.initialize(model=module, config=config)
    torch.manual_seed(100 + engine.global_rank)
    return engine, losses


def stream(engine, gas, calls, done=0):
    seed = 1 + 100 * engine.grid.get_data_parallel_rank()
    return itertools.islice(iter(t.data(gas * calls, seed=seed)), gas * done, None)


def state(engine):
    return (
        [p.detach().clone() for p in engine.module.parameters()],
        [b.clone() for b in engine.module.buffers()],
        engine.get_lr(),
    )


def whole(rank, stages, gas, calls, config, folder=None, saves=()):
    """All calls; what it computed, what train_batch returned, and every loss that was learnt."""
    engine, losses = build(stages, config)
    data = stream(engine, gas, calls)
    returned, learnt = [], {}
    for call in range(1, calls + 1):
        returned.append(engine.train_batch(data).item())
        learnt.update(engine.batch_losses())
        if call in saves:
            engine.save_checkpoint(folder, client_state={"random": torch.get_rng_state()})
    between = state(engine)
    engine.drain()
    learnt.update(engine.batch_losses())
    return losses, returned, learnt, between, state(engine)


def resumed(rank, stages, gas, calls, config, folder, at, noise=0):
    """The rest from call ``at`` on, in an engine that may have trained on something else before."""
    engine, losses = build(stages, config)
    other = iter(t.data(noise * gas, seed=77))
    for _ in range(noise):
        engine.train_batch(other)
    losses.clear()
    _, client = engine.load_checkpoint(folder, tag=f"global_step{at}")
    torch.set_rng_state(client["random"])
    losses.clear()  # of replayed forwards there are none: the last stage has nothing in flight
    data = stream(engine, gas, calls, done=at)
    returned, learnt = [], {}
    for _ in range(at, calls):
        returned.append(engine.train_batch(data).item())
        learnt.update(engine.batch_losses())
    between = state(engine)
    engine.drain()
    learnt.update(engine.batch_losses())
    return losses, returned, learnt, between, state(engine)


def same(mine, theirs):
    (weights, buffers, lr), (others, their_buffers, their_lr) = mine, theirs
    assert lr == their_lr
    for got, want in zip([*weights, *buffers], [*others, *their_buffers], strict=True):
        assert torch.equal(got, want), (got - want).abs().max()


def assert_resumed(results, expected, at, gas):
    for (losses, returned, learnt, between, end), (all_losses, all_returned, all_learnt, *states) in zip(
        results, expected, strict=True
    ):
        assert losses == all_losses[at * gas :]
        assert [repr(x) for x in returned] == [repr(x) for x in all_returned[at:]]  # nan where nothing is known yet
        assert learnt == {step: all_learnt[step] for step in learnt}
        assert set(all_learnt) - set(learnt) <= set(range(1, at + 1))
        same(between, states[0])
        same(end, states[1])


CASES = {
    "P2": (2, 1, {}, t.NADAMW, {}),
    "P3-K2": (3, 2, {}, t.NADAMW, {}),
    "P4": (4, 1, {}, t.NADAMW, {}),
    "P4-K2-within-a-batch": (4, 2, {}, t.NADAMW, {}),
    "P4-K4": (4, 4, {}, t.NADAMW, {}),
    "P4-extra": (4, 1, {"extra_in_flight": 3}, t.NADAMW, {}),
    "P3-2bw": (3, 2, {"weights": "2bw"}, t.NADAMW, {}),
    "P3-torch": (3, 2, {}, t.ADAMW, {}),
    "P3-muon": (3, 1, {}, MUON, {}),
    "P4-K2-nag": (4, 2, {}, NAG, {}),
    "P2-flush": (2, 2, {"schedule": "1f1b_flush"}, t.NADAMW, {}),
    "P3-bf16": (3, 2, {}, MUON, BF16),
    "P3-bf16-torch": (3, 2, {}, t.ADAMW, BF16),
    "P3-late-norm": (3, 1, {"clip": "lagged_global"}, t.NADAMW, {"gradient_clipping": 0.05}),
    "P3-zero": (3, 1, {}, t.NADAMW, ZERO),
    "P3-zero-torch": (3, 1, {}, t.ADAMW, ZERO),
}


@pytest.mark.parametrize(("stages", "gas", "block", "optimizer", "more"), CASES.values(), ids=CASES)
def test_saves_disturb_nothing_and_a_resumed_run_never_stopped(tmp_path, stages, gas, block, optimizer, more):
    config = t.ds_config(gas, optimizer, block, **WARM_UP, **more)
    run = {"stages": stages, "gas": gas, "calls": 8, "config": config}
    expected = run_ranks(whole, stages, **run)
    saved = run_ranks(whole, stages, folder=str(tmp_path), saves=(1, 2, 5), **run)
    for mine, theirs in zip(saved, expected, strict=True):
        assert mine[0] == theirs[0]
        assert [repr(x) for x in mine[1]] == [repr(x) for x in theirs[1]]
        assert mine[2] == theirs[2]
        same(mine[3], theirs[3])
        same(mine[4], theirs[4])
    for at, noise in ((1, 0), (2, 3), (5, 0)):
        assert_resumed(run_ranks(resumed, stages, folder=str(tmp_path), at=at, noise=noise, **run), expected, at, gas)
