"""Methods with a look-ahead, and methods of matrices: the engine is the delay simulator, and evaluates true weights."""

from __future__ import annotations

import functools

import pytest
import torch

from noflush.methods.table import load
from noflush.simulate import Precision
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

MUON = {"type": "DelayAwareMuon", "params": {"lr": 3e-3, "weight_decay": 0.01, "look_ahead": 0.9}}
PLAIN_MUON = {"type": "DelayAwareMuon", "params": {"lr": 3e-3}}
SOAP = {"type": "DelayAwareSOAP", "params": {"lr": 1e-3, "refresh_every": 2, "look_ahead": 0.9}}
OF_MOMENTUM = {"type": "DelayAwareSOAP", "params": {**SOAP["params"], "estimate": "first"}}
NADAMW = {"type": "DelayAwareNAdamW", "params": {"lr": 3e-3, "weight_decay": 0.01, "look_ahead": 0.5}}
ADAMW = {"type": "PipeDreamAdamW", "params": {"lr": 3e-3, "look_ahead": 1.0}}
NAG = {"type": "DelayAwareNAG", "params": {"lr": 3e-2, "momentum": 0.9, "look_ahead": 0.3}}
BF16 = {"bf16": {"enabled": True}}
ZERO = {"zero_optimization": {"stage": 1}}
CALLS = 9


def make(section):
    return lambda params: load(section["type"])(params, **section["params"])


def cases(stages):
    """name -> (K, block, DeepSpeed's config, optimizer, simulator's precision, clip)."""
    found = {}
    for section in (MUON, PLAIN_MUON, SOAP, NADAMW, ADAMW, NAG):
        name = f"{section['type']} {section['params'].get('look_ahead', 0)}"
        for gas in (1, 2):
            for weights in ("stash", "latest"):
                found[f"{name}, {weights}, K={gas}"] = (gas, {"weights": weights}, {}, section, Precision(), 0.0)
    found["first moments"] = (2, {"weights": "latest"}, {}, OF_MOMENTUM, Precision(), 0.0)
    found["clipped"] = (2, {}, {}, MUON, Precision(), 0.05)
    found["bf16"] = (1, {}, BF16, MUON, Precision(torch.bfloat16), 0.0)
    found["bf16 ZeRO-1"] = (1, {}, BF16 | ZERO, MUON, Precision(torch.bfloat16), 0.0)
    found["float32 ZeRO-1"] = (1, {}, ZERO, MUON, Precision(), 0.0)
    found["flush"] = (2, {"schedule": "1f1b_flush"}, {}, MUON, Precision(), 0.0)
    if stages == 2:
        found["2bw"] = (2, {"weights": "2bw"}, {}, MUON, Precision(), 0.0)
    return found


def look_and_drain(engine, call):
    """An evaluation in the middle, which disturbs nothing, and a drain, after which a look-ahead starts anew."""
    if call == 3:
        engine.eval_batch(iter(t.data(2, seed=9)), num_micro_batches=2)
    if call == 5:
        engine.drain()


def train_all(rank, stages):
    return {
        name: t.train(
            rank, stages, gas, CALLS, t.ds_config(gas, section, block, **more | {"gradient_clipping": clip}),
            between=look_and_drain,
        )
        for name, (gas, block, more, section, _, clip) in cases(stages).items()
    }  # fmt: skip


@functools.cache
def trained(stages):
    return run_ranks(train_all, stages, timeout=280, stages=stages)


@pytest.mark.parametrize(
    ("stages", "name"),
    [pytest.param(2, name, marks=pytest.mark.slow) for name in cases(2)] + [(4, name) for name in cases(4)],
)
def test_the_engine_is_the_simulator(stages, name):
    gas, block, _, section, precision, clip = cases(stages)[name]
    expected = t.simulate(
        stages, gas, CALLS, make(section), block, drain_after=(6, CALLS), precision=precision, clip=clip
    )
    t.assert_same([result[name] for result in trained(stages)], *expected)
