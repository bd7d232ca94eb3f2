"""Every optimizer DeepSpeed builds here without compiling equals the simulator with torch's own, bit for bit."""

from __future__ import annotations

import pytest
import torch

from noflush.patches.deepspeed.optimizers import HOST_OPTIMIZERS
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

CALLS = 5
MORE = {"SGD": {"momentum": 0.9, "nesterov": True}, "Adam": {"torch_adam": True, "adam_w_mode": False}}
MORE["AdamW"] = {"torch_adam": True}
ZERO = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
NOT_HERE = {"MuSGD", "MuAdam", "MuAdamW", "Muon"}  # another package; a step that compiles for a minute
EXACT = [
    (name, zero)
    for name, known in HOST_OPTIMIZERS.items()
    for zero, verdict in ((False, known.plain), (True, known.flat))
    if verdict == "exact" and name not in NOT_HERE
]


def train_all(rank):
    results = {}
    for name, zero in EXACT:
        optimizer = {"type": name, "params": {"lr": 3e-3, **MORE.get(name, {})}}
        results[name, zero] = t.train(rank, 2, 1, CALLS, t.ds_config(1, optimizer, {}, **(ZERO if zero else {})))
    return results


def test_all_that_are_called_exact_are():
    torch.set_num_threads(1)
    results = run_ranks(train_all, 2, timeout=280)
    for name, zero in EXACT:
        params = {k: v for k, v in MORE.get(name, {}).items() if k not in ("torch_adam", "adam_w_mode")}
        rule = getattr(torch.optim, name)
        expected = t.simulate(2, 1, CALLS, lambda ps, rule=rule, params=params: rule(ps, lr=3e-3, **params))
        t.assert_same([r[name, zero] for r in results], *expected)


def muon(params):
    """Its groups, as DeepSpeed makes them: matrices, and what Adam updates."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    groups = [
        {"params": [p for p in params if p.ndim >= 2], "use_muon": True, "lr": 3e-3},
        {"params": [p for p in params if p.ndim < 2], "use_muon": False, "lr": 3e-3},
    ]
    return MuonWithAuxAdam(groups)


def train_muon(rank):
    optimizer = {"type": "Muon", "params": {"lr": 3e-3}}
    return t.train(rank, 2, 1, 3, t.ds_config(1, optimizer, {}))


@pytest.mark.slow
def test_muon_is_right_to_rounding():
    torch.set_num_threads(1)
    results = run_ranks(train_muon, 2, timeout=280)
    losses, weights = t.simulate(2, 1, 3, muon)
    assert results[-1]["losses"] == pytest.approx(losses, rel=1e-5)
    # Over all weights: biases of keys, whose gradients are nothing but rounding, go their own way under Adam.
    apart = [
        (got - want).abs().flatten()
        for result, expected in zip(results, weights, strict=True)
        for got, want in zip(result["weights"], expected, strict=True)
    ]
    assert torch.cat(apart).mean() < 2e-6  # of steps of 3e-3
