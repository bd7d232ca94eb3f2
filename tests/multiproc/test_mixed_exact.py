"""Mixed precision, ZeRO-1 and data parallel x pipeline equal the delay simulator bit for bit on a CPU.

With noflush's optimizers and with DeepSpeed's own, whose BF16_Optimizer and ZeRO-1 are redirected into the ring.
"""

from __future__ import annotations

import functools

import pytest
import torch

from noflush.simulate import Precision
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

BF16 = {"bf16": {"enabled": True}}
IMMEDIATE = {"bf16": {"enabled": True, "immediate_grad_update": True}}
LATE = {"bf16": {"enabled": True, "immediate_grad_update": False}}
ZERO = {"zero_optimization": {"stage": 1}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
FP32_WIRE = {"communication_data_type": "fp32"}
BASELINE = {"type": "PipeDreamAdamW", "params": {"lr": 3e-3, "weight_decay": 0.01}}
NAG = {"type": "DelayAwareNAG", "params": {"lr": 3e-2, "momentum": 0.9, "weight_decay": 0.01}}
IN_BF16 = Precision(torch.bfloat16)
SUMS_IN_FP32 = Precision(torch.bfloat16, torch.float32, torch.bfloat16)
ALL_IN_FP32 = Precision(torch.bfloat16, torch.float32, torch.float32)


def nag(params):
    from noflush.methods import DelayAwareNAG

    return DelayAwareNAG(params, lr=3e-2, momentum=0.9, weight_decay=0.01)


OURS = (t.NADAMW, t.torch_nadam)
THEIRS = (t.ADAMW, t.adamw)


def cases(stages, replicas):
    """name -> (K, block, config, (optimizer, its maker), simulator's precision, clip)."""
    found = {}
    kinds = [("float32 ZeRO-1", ZERO, Precision()), ("bf16 ZeRO-1", BF16 | ZERO, IN_BF16)]
    if replicas == 1:
        kinds += [("bf16", BF16, IN_BF16), ("bf16, fp32 sums, ZeRO-1", BF16 | ZERO | FP32_SUMS, SUMS_IN_FP32)]
    else:
        sums = BF16 | ZERO | FP32_SUMS
        kinds += [
            ("float32", {}, Precision()),
            ("bf16", BF16, IN_BF16),
            ("bf16, fp32 sums and wire, ZeRO-1", sums | FP32_WIRE, ALL_IN_FP32),
            ("bf16, fp32 sums, ZeRO-1", sums, SUMS_IN_FP32),
        ]
    for gas in (1, 2):
        for kind, config, precision in kinds:
            for whose, pair in (("noflush's", OURS), ("DeepSpeed's", THEIRS)):
                found[f"{kind}, {whose}, K={gas}"] = (gas, {}, config, pair, precision, 0.0)
    if replicas == 1:
        found["bf16, latest"] = (1, {"weights": "latest"}, BF16, OURS, IN_BF16, 0.0)
        found["bf16, gradients moved at once"] = (2, {}, IMMEDIATE, OURS, IN_BF16, 0.0)
        found["bf16, gradients moved late, DeepSpeed's"] = (2, {}, LATE, THEIRS, IN_BF16, 0.0)
        found["bf16, clipped"] = (2, {}, BF16, OURS, IN_BF16, 0.05)
        found["bf16 ZeRO-1, clipped"] = (2, {}, BF16 | ZERO, OURS, IN_BF16, 0.05)
        found["bf16, PipeDream's baseline"] = (1, {}, BF16, (BASELINE, t.adamw), IN_BF16, 0.0)
        found["bf16 ZeRO-1, NAG"] = (1, {}, BF16 | ZERO, (NAG, nag), IN_BF16, 0.0)
        found["float32 ZeRO-1, latest"] = (1, {"weights": "latest"}, ZERO, OURS, Precision(), 0.0)
        found["bf16, flush"] = (2, {"schedule": "1f1b_flush"}, BF16, OURS, IN_BF16, 0.0)
    return found


def calls_of(gas):
    return 12 // gas + 3


def drain_after_call_3(engine, call):
    if call == 2:
        engine.drain()


def train_all(rank, stages, replicas):
    results = {}
    for name, (gas, block, more, (optimizer, _), _, clip) in cases(stages, replicas).items():
        config = t.ds_config(gas, optimizer, block, **more | {"gradient_clipping": clip})
        results[name] = t.train(rank, stages, gas, calls_of(gas), config, between=drain_after_call_3)
    return results


@functools.cache
def trained(stages, replicas):
    return run_ranks(train_all, stages * replicas, timeout=280, stages=stages, replicas=replicas)


WHERE = [(2, 1), (4, 1), (2, 2)]


# Replicas with every keeper of weights take a minute and more; in `make test` their checkpoints stand for them, and
# four stages for two.
@pytest.mark.parametrize(
    ("stages", "replicas", "name"),
    [
        pytest.param(*where, name, marks=[] if where == (4, 1) else [pytest.mark.slow])
        for where in WHERE
        for name in cases(*where)
    ],
)
def test_equals_the_simulator(stages, replicas, name):
    gas, block, _, (_, make_optimizer), precision, clip = cases(stages, replicas)[name]
    losses, weights = t.simulate(
        stages, gas, calls_of(gas), make_optimizer, block, clip=clip, drain_after=(3,), precision=precision,
        replicas=replicas,
    )  # fmt: skip
    results = [r[name] for r in trained(stages, replicas)]
    if replicas == 1:
        t.assert_same(results, losses, weights)
    else:
        for replica in range(replicas):
            t.assert_same(results[replica::replicas], losses[replica], weights)


def clip_sharded(rank):
    config = t.ds_config(2, t.NADAMW, {}, **ZERO, gradient_clipping=0.05)
    return t.train(rank, 2, 2, 8, config)


def test_clipping_by_the_norm_of_all_shards():
    """The norm of shards adds up in another order: equal to rounding, and alike on the replicas to the bit."""
    results = run_ranks(clip_sharded, 4)
    losses, weights = t.simulate(2, 2, 8, t.torch_nadam, clip=0.05, replicas=2)
    for rank, result in enumerate(results):
        if rank >= 2:
            assert result["losses"] == pytest.approx(losses[rank % 2], rel=1e-5)
        for got, want in zip(result["weights"], weights[rank // 2], strict=True):
            assert torch.allclose(got, want, rtol=1e-5, atol=2e-5)
        assert all(torch.equal(a, b) for a, b in zip(result["weights"], results[rank ^ 1]["weights"], strict=True))


def half_frozen(gpt=None):
    layers = t.layers(gpt)
    for layer in layers[:2]:
        layer.requires_grad_(False)
    layers[-2].qkv.requires_grad_(False)
    return layers


FROZEN_CASES = {
    "float32": (t.NADAMW, {}, t.torch_nadam, Precision()),
    "float32, DeepSpeed's": (t.ADAMW, {}, t.adamw, Precision()),
    "bf16": (t.NADAMW, BF16, t.torch_nadam, IN_BF16),
    "float32 ZeRO-1": (t.NADAMW, ZERO, t.torch_nadam, Precision()),
}


def train_half_frozen(rank):
    results = {}
    for name, (optimizer, more, _, _) in FROZEN_CASES.items():
        rings = []
        results[name] = t.train(
            rank, 2, 1, 10, t.ds_config(1, optimizer, {}, **more), make_layers=half_frozen,
            between=lambda e, _: rings.append(e.pipeline_stage.runner.ring),  # noqa: B023
        )  # fmt: skip
        results[name]["swapped"] = sum(p.numel() for p in rings[-1].params)
    return results


def test_frozen_parameters_stay_and_have_one_version():
    """Neither decayed nor kept in every slot: what has no gradient is no business of an update."""
    results = run_ranks(train_half_frozen, 2)
    parts = t.split_by_blocks(half_frozen(), 2)
    for name, (_, _, make_optimizer, precision) in FROZEN_CASES.items():
        losses, weights = t.simulate(2, 1, 10, make_optimizer, make_layers=half_frozen, precision=precision)
        assert results[-1][name]["losses"] == losses
        for stage, part in enumerate(parts):
            learnt = iter(weights[stage])
            for p, got in zip(part.parameters(), results[stage][name]["weights"], strict=True):
                want = next(learnt) if p.requires_grad else p.detach().to(precision.weights)
                assert torch.equal(got, want), name
            assert results[stage][name]["swapped"] == sum(p.numel() for p in part.parameters() if p.requires_grad)


def decay_matrices_only(parameters):
    """The two groups of most GPT runs, with a learning rate of its own for the second."""
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0, "lr": 1e-3},
    ]


def nadam_in_groups(parameters):
    return t.torch_nadam(decay_matrices_only(parameters))


GROUP_CASES = {"float32": ({}, Precision()), "bf16": (BF16, IN_BF16), "bf16 ZeRO-1": (BF16 | ZERO, IN_BF16)}


def train_in_groups(rank):
    return {
        name: t.train(rank, 2, 1, 10, t.ds_config(1, t.NADAMW, {}, **more), groups=decay_matrices_only)
        for name, (more, _) in GROUP_CASES.items()
    }


@pytest.mark.parametrize("replicas", [1, 2])
def test_parameter_groups_keep_their_own_hyper_parameters(replicas):
    results = run_ranks(train_in_groups, 2 * replicas)
    for name, (_, precision) in GROUP_CASES.items():
        losses, weights = t.simulate(2, 1, 10, nadam_in_groups, precision=precision, replicas=replicas)
        for replica in range(replicas):
            mine = losses[replica] if replicas > 1 else losses
            t.assert_same([r[name] for r in results][replica::replicas], mine, weights)
