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
NOT_HERE = {"MuSGD", "MuAdam", "MuAdamW", "Muon"}  # another package; tests/hosts/test_muon.py
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
