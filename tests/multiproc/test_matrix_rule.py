"""A rule that sees whole matrices: as the simulator has it, in the engine, beside another, and under ZeRO-1."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from noflush.methods.table import METHODS, load
from noflush.simulate import Precision
from tests.multiproc import matrix_rule
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc
RULE = {"type": "MatrixRule", "params": {"lr": 1e-2}}
CALLS = 6


def mixed(parameters):
    """Matrices by the rule, the rest by NAdam."""
    matrices = [p for p in parameters if p.dim() > 1]
    rest = [p for p in parameters if p.dim() < 2]
    return [{"params": matrices}, {"params": rest, "method": "DelayAwareNAdamW", "lr": 3e-3}]


def train(rank, stages, dp, config, groups=None):
    METHODS["MatrixRule"] = matrix_rule.ROW
    return t.train(rank, stages, 1, CALLS, config, groups=groups)


def expected(stages, groups=lambda ps: ps, **more):
    with mock.patch.dict(METHODS, {"MatrixRule": matrix_rule.ROW}):
        return t.simulate(stages, 1, CALLS, lambda ps: matrix_rule.MatrixRule(groups(ps), lr=1e-2), **more)


def assert_close(results, losses, weights, low):
    """Every stage of both replicas against the simulator's, to the rounding of the replicas' sums."""
    for stage in range(2):
        for replica in range(2):
            got = results[2 * stage + replica]["weights"]
            for a, b in zip(got, weights[stage], strict=True):
                assert torch.allclose(a, b, rtol=1e-2 if low else 1e-5, atol=1e-2 if low else 1e-6)
    for replica in range(2):
        assert results[2 + replica]["losses"] == pytest.approx(losses[replica], rel=1e-2 if low else 1e-5)


@pytest.mark.parametrize("groups", [None, mixed])
def test_a_matrix_rule_is_the_simulators_to_the_bit(groups):
    results = run_ranks(train, 2, stages=2, dp=1, config=t.ds_config(1, RULE, block={}), groups=groups)
    t.assert_same(results, *expected(2, **({} if groups is None else {"groups": groups})))


@pytest.mark.parametrize(
    ("name", "own"), [("DelayAwareMuon", {}), ("DelayAwareSOAP", {}), ("DelayAwareSOAP", {"estimate": "first"})]
)
@pytest.mark.parametrize("more", [{}, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}])
def test_zero_1_with_noflushs_own_rules_of_matrices(name, own, more):
    """As below; the fused weights of attention are three matrices each, and the rest is AdamW's."""
    rule = {"type": name, "params": {"lr": 1e-3, "look_ahead": 0.9, **own}}
    config = t.ds_config(1, rule, block={}, zero_optimization={"stage": 1}, **more)
    results = run_ranks(t.train, 4, timeout=280, stages=2, gas=1, calls=CALLS, config=config)
    precision = Precision(torch.bfloat16, torch.float32) if more else Precision()
    losses, weights = t.simulate(
        2, 1, CALLS, lambda ps: load(name)(ps, **rule["params"]), replicas=2, precision=precision, drain_after=(CALLS,)
    )
    assert_close(results, losses, weights, bool(more))


@pytest.mark.parametrize("more", [{}, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}])
def test_zero_1_cuts_between_matrices(more):
    """Two stages of two replicas; every matrix is updated whole, by one of them."""
    config = t.ds_config(1, RULE, block={}, zero_optimization={"stage": 1}, zero_allow_untested_optimizer=True, **more)
    results = run_ranks(train, 4, stages=2, dp=2, config=config)
    precision = Precision(torch.bfloat16, torch.float32) if more else Precision()
    losses, weights = expected(2, replicas=2, precision=precision)
    assert_close(results, losses, weights, bool(more))
