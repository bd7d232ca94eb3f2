"""Checkpoints in mixed precision and under ZeRO-1: resuming is never having stopped, and stock DeepSpeed loads them."""

from __future__ import annotations

import itertools

import pytest
import torch

from noflush.launch.training.pickles import file_fault
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks
from tests.multiproc.test_nonfinite import allow_fp16

pytestmark = pytest.mark.multiproc

ZERO = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}
NAG = {"type": "DelayAwareNAG", "params": {"lr": 3e-2, "momentum": 0.9}}
SMALL = {"type": "DelayAwareNAdamW", "params": {"lr": 3e-3, "moments": "bf16"}}
MUON = {"type": "DelayAwareMuon", "params": {"lr": 3e-3, "look_ahead": 0.5}}
SOAP = {"type": "DelayAwareSOAP", "params": {"lr": 3e-3, "refresh_every": 3, "look_ahead": 0.5}}
# Overflows until the save at call 5 and beyond, and grows soon.
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 4, "hysteresis": 1}}
CASES = {
    "bf16": (t.NADAMW, BF16),
    "bf16 ZeRO-1": (t.NADAMW, BF16 | ZERO),
    "bf16 ZeRO-1, fp32 sums": (t.NADAMW, BF16 | ZERO | {"data_types": {"grad_accum_dtype": "fp32"}}),
    "float32 ZeRO-1": (t.NADAMW, ZERO),
    "bf16 ZeRO-1, NAG": (NAG, BF16 | ZERO),
    "bf16 ZeRO-1, DeepSpeed's AdamW": (t.ADAMW, BF16 | ZERO),
    "bf16 moments": (SMALL, BF16),
    "fp16": (t.NADAMW, FP16 | ZERO),
    "fp16, DeepSpeed's AdamW": (t.ADAMW, FP16 | ZERO),
    "float32 ZeRO-1, Muon": (MUON, ZERO),
    "bf16, Muon": (MUON, BF16),
    "bf16 ZeRO-1, Muon": (MUON, BF16 | ZERO),
    "bf16 ZeRO-1, fp32 sums, Muon": (MUON, BF16 | ZERO | {"data_types": {"grad_accum_dtype": "fp32"}}),
    "fp16, Muon": (MUON, FP16 | ZERO),
    "bf16 ZeRO-1, SOAP": (SOAP, BF16 | ZERO),
}


CALLS = 14


def config_of(name, folder):
    optimizer, more = CASES[name]
    return t.ds_config(1, optimizer, {}, **more), f"{folder}/{name.replace(' ', '_')}"


def train_save_and_go_on(rank, folder):
    allow_fp16()
    results = {}
    for name in CASES:
        config, where = config_of(name, folder)
        engine = t.build(2, config)
        it = iter(t.data(CALLS, seed=engine.grid.get_data_parallel_rank()))
        for call in range(CALLS):
            engine.train_batch(it)
            if call == 4:
                engine.save_checkpoint(where)
        engine.drain()
        results[name] = outcome_of(engine)
    return results


def outcome_of(engine):
    scale = engine.optimizer.loss_scaler.cur_scale if engine.fp16_enabled() else 1.0
    return [p.detach().clone() for p in engine.module.parameters()], scale, engine.skipped_steps


def resume(rank, folder):
    allow_fp16()
    results = {}
    for name in CASES:
        config, where = config_of(name, folder)
        engine = t.build(2, config)
        for call in range(3):
            engine.train_batch(iter(t.data(1, seed=70 + call)))
        engine.load_checkpoint(where)
        it = itertools.islice(iter(t.data(CALLS, seed=engine.grid.get_data_parallel_rank())), 5, None)
        for _ in range(CALLS - 5):
            engine.train_batch(it)
        engine.drain()
        results[name] = outcome_of(engine)
    return results


def load_in_stock(rank, folder):
    allow_fp16()
    losses = {}
    for name, (_, more) in CASES.items():
        config, where = config_of(name, folder)
        stock, ours = t.build(2, t.ds_config(1, t.ADAMW, **more)), t.build(2, config)
        # A stock AdamW takes noflush's moments too.
        # (Other rules' state is no AdamW's; and bf16 without ZeRO DeepSpeed 0.19.8 saves but cannot load.)
        takes_state = not any(rule in name for rule in ("NAG", "Muon", "SOAP")) and "zero_optimization" in more
        stock.load_checkpoint(where, load_optimizer_states=takes_state, load_module_only=not takes_state)
        ours.load_checkpoint(where)
        losses[name] = [e.eval_batch(iter(t.data(2, seed=5)), num_micro_batches=2).item() for e in (stock, ours)]
        stock.train_batch(iter(t.data(1)))
        if "fp16" in name:
            losses[name].append(stock.optimizer.loss_scaler.cur_scale)
        else:
            assert torch.isfinite(torch.as_tensor(stock.get_global_grad_norm()))
    return losses


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_resume_is_a_run_that_drained_there(tmp_path, replicas):
    whole = run_ranks(train_save_and_go_on, 2 * replicas, timeout=200, folder=str(tmp_path))
    # Nothing that noflush and DeepSpeed save needs more trust than launch/ has in a checkpoint.
    assert [fault for path in tmp_path.rglob("*.pt") if (fault := file_fault(path))] == []
    resumed = run_ranks(resume, 2 * replicas, timeout=200, folder=str(tmp_path))
    for name in CASES:
        for one, other in zip(whole, resumed, strict=True):
            (weights, *counts), (again, *counts_again) = one[name], other[name]
            assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True)), name
            assert counts == counts_again, name
        if "fp16" in name:
            scales = {r[name][1] for r in whole}
            assert len(scales) == 1  # one scaler for the pipeline after a drain
            assert all(r[name][2] > 0 for r in whole[-replicas:])
    loaded = run_ranks(load_in_stock, 2 * replicas, timeout=200, folder=str(tmp_path))
    for losses in loaded:
        for name, (stock, ours, *scale) in losses.items():
            assert stock == ours, name
            assert scale == loaded[0][name][2:]  # stock unscales every stage by its own scaler: they must be alike
