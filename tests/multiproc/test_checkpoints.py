"""Evaluation in the middle of training; checkpoints, resuming, and stock DeepSpeed loading them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc


MUON = {"type": "DelayAwareMuon", "params": {"look_ahead": 0.5}}
MUON_OF_DEEPSPEED = {"type": "Muon", "params": {"lr": 3e-3, "look_ahead": 0.5}}
SOAP = {"type": "DelayAwareSOAP", "params": {"look_ahead": 0.5, "refresh_every": 3, "estimate": "first"}}
WARM_UP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 20}}}


def evaluated(engine):
    return engine.eval_batch(iter(t.data(4, seed=5)), num_micro_batches=4).item()


def train_save_and_go_on(rank, folder, stages, gas, optimizer):
    engine = t.build(stages, t.ds_config(gas, optimizer, {}, **WARM_UP))
    it = iter(t.data(gas * 8))
    for call in range(8):
        engine.train_batch(it)
        if call == 3:
            engine.save_checkpoint(folder)
            saved = evaluated(engine)
    engine.drain()
    weights = [p.detach().clone() for p in engine.module.parameters()]
    files = {f.name: f.stat().st_size for f in Path(folder).rglob("layer_*.pt")}
    return weights, engine.global_steps, engine.global_samples, engine.updates, files, saved


def resume(rank, folder, stages, gas, optimizer):
    from noflush.stage.intake import DataExhausted

    engine = t.build(stages, t.ds_config(gas, optimizer, {}, **WARM_UP))
    noise = iter(t.data(3 * gas, seed=77))
    for _ in range(3):
        engine.train_batch(noise)  # loading with micro-batches in flight forgets them
    if gas > 1:
        with pytest.raises(DataExhausted):
            engine.train_batch(iter(t.data(gas - 1, seed=78)))  # and those that were kept for a next call
    engine.load_checkpoint(folder)
    assert engine.loss_step == (4 if rank == stages - 1 else 4 - engine.schedule.loss_lag(rank) or None)
    it = itertools.islice(iter(t.data(gas * 8)), gas * 4, None)
    for _ in range(4):
        engine.train_batch(it)
    engine.drain()
    weights = [p.detach().clone() for p in engine.module.parameters()]
    return weights, engine.global_steps, engine.global_samples, engine.updates, engine.loss_step


def load_in_stock(rank, folder, optimizer):
    """Losses of stock and of noflush with the checkpoint's weights; a stock NAdam takes NAdamW's state too."""
    import deepspeed

    nadam = {
        "type": "NAdam",
        "params": {"lr": 3e-3, "betas": [0.99, 0.999], "weight_decay": 0.01, "decoupled_weight_decay": True},
    }
    stock = t.build(2, t.ds_config(1, nadam))
    assert type(stock).__name__ == "PipelineEngine"
    assert isinstance(stock, deepspeed.PipelineEngine)
    alike = optimizer == t.NADAMW
    stock.load_checkpoint(folder, load_optimizer_states=alike, load_module_only=not alike)
    ours = t.build(2, t.ds_config(1, optimizer, {}))
    assert isinstance(ours, deepspeed.PipelineEngine)
    assert issubclass(type(ours), deepspeed.PipelineEngine)
    ours.load_checkpoint(folder)
    losses = [evaluated(engine) for engine in (stock, ours)]
    stock.train_batch(iter(t.data(1)))
    return losses, stock.global_steps


@pytest.mark.parametrize(
    ("stages", "gas", "optimizer"),
    [
        (2, 1, t.NADAMW),
        (2, 2, t.NADAMW),
        (4, 2, t.NADAMW),
        (2, 1, MUON),
        (4, 1, MUON),
        (2, 2, MUON_OF_DEEPSPEED),
        (2, 1, SOAP),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else str(value),
)
def test_resume_is_a_run_that_never_stopped(tmp_path, stages, gas, optimizer):
    """What is saved are the true weights, with which evaluation computes too, whatever forwards look ahead at."""
    more = {"folder": str(tmp_path), "stages": stages, "gas": gas, "optimizer": optimizer}
    whole = run_ranks(train_save_and_go_on, stages, **more)
    resumed = run_ranks(resume, stages, **more)
    for (weights, *counts, files, _), (again, *counts_again, loss_step) in zip(whole, resumed, strict=True):
        assert counts == counts_again == [8, 8 * 3 * gas, 8]
        assert loss_step == 8
        assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
        assert max(files.values()) < 40_000  # a layer's file holds the layer, not the flat storage of the stage
    if (stages, gas) == (2, 1):
        for losses, steps in run_ranks(load_in_stock, 2, folder=str(tmp_path), optimizer=optimizer):
            assert losses == [whole[0][-1]] * 2
            assert steps == (5 if optimizer == t.NADAMW else 1)


def interval_of_a_drain(rank):
    engine = t.build(2, t.ds_config(1, block={}))
    engine.train_batch(iter(t.data(1)))
    engine.pipeline_stage.recorder.take_interval()
    engine.drain()
    return engine.pipeline_stage.recorder.take_interval()


def test_a_drains_work_is_not_set_against_the_calls_time():
    # It would be a bubble below zero in the progress line after a checkpoint.
    for interval in run_ranks(interval_of_a_drain, 2):
        assert set(interval) == {"seconds", "bubble"}


def count_anew(rank):
    engine = t.build(2, t.ds_config(1, block={}))
    it = iter(t.data(8))
    for _ in range(4):
        engine.train_batch(it)
    engine.drain()
    engine.global_steps = 0  # as Megatron-DeepSpeed does after loading with --finetune or --reset-iteration
    engine.train_batch(it)
    engine.train_batch(it)
    return engine.global_steps, engine.updates, engine.loss_step


def test_a_script_may_count_anew_from_a_drained_pipeline():
    assert run_ranks(count_anew, 2) == [(2, 1, 1), (2, 2, 2)]


def evaluate_mid_flight(rank):
    engine = t.build(4, t.ds_config(1, block={}))
    for tokens, labels in t.data(9):
        engine.train_batch(iter([(tokens, labels)]))
    return (
        engine.eval_batch(iter(t.data(1, seed=5))).item(),
        engine.updates,
        len(engine.pipeline_stage.runner.ring.in_flight),
    )


def test_evaluation_sees_every_stages_newest_weights_and_leaves_micro_batches_in_flight():
    from noflush.order.schedule import Schedule
    from noflush.simulate import DelaySimulator

    torch.set_num_threads(1)
    results = run_ranks(evaluate_mid_flight, 4)
    assert [updates for _, updates, _ in results] == [6, 7, 8, 9]
    assert [in_flight for _, _, in_flight in results] == [3, 2, 1, 0]
    # The simulator's stages after 6, 7, 8 and 9 updates, put together to one model.
    sim = DelaySimulator(t.split_by_blocks(t.layers(), 4), t.next_token_loss, t.torch_nadam, Schedule(4, 1))
    weights = {}
    for updates, pair in enumerate(t.data(9), 1):
        sim.train_micro_batch(*pair)
        if updates >= 6:
            weights[updates - 6] = {name: p.clone() for name, p in sim.parameters(updates - 6).items()}
    x, labels = t.data(1, seed=5)[0]
    for stage, part in enumerate(t.split_by_blocks(t.layers(), 4)):
        part.load_state_dict(weights[stage])
        x = part(x)
    assert {value for value, _, _ in results} == {t.next_token_loss(x, labels).item()}


class Dropping(nn.Module):
    """Notes in which mode it runs; dropout in a recomputed forward would differ in another mode."""

    modes: list = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        Dropping.modes.append(self.training)
        return self.linear(x)


def drain_in_evaluation_mode(rank):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    module = PipelineModule(
        layers=[Dropping(), Dropping()],
        num_stages=2,
        loss_fn=nn.functional.mse_loss,
        partition_method="uniform",
        activation_checkpoint_interval=1,
        checkpointable_layers=["Dropping"],
    )
    engine, *_ = deepspeed.initialize(model=module, config=t.ds_config(1, block={}))
    sample = (torch.zeros(2, 16), torch.zeros(2, 16))
    for _ in range(3):
        engine.train_batch(iter([sample]))
    engine.eval()
    Dropping.modes.clear()
    engine.drain()
    return list(Dropping.modes), engine.module.training


def test_drain_recomputes_in_training_mode():
    first, last = run_ranks(drain_in_evaluation_mode, 2)
    assert first == ([True], False)
    assert last == ([], False)
