"""Clipping by the newest norm of all stages that is known without waiting: the simulator's, bit for bit.

And what every rank is told of it: which batch's norm, and when.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from noflush.methods.table import load
from noflush.order.clipping import known_batch
from noflush.order.schedule import Schedule
from noflush.simulate import DelaySimulator, Precision
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc
WIDTH, CALLS, CLIP = 8, 22, 0.1
# Where a constant factor shows, and where it is carried on.
SGD = ("SGD", {"lr": 0.3})
NADAMW = ("DelayAwareNAdamW", {"lr": 1e-2})
MUON = ("DelayAwareMuon", {"lr": 1e-2, "look_ahead": 0.9})
LATE = {"clip": "lagged_global"}


def layers(stages):
    torch.manual_seed(3)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(stages)]


def data(count):
    draw = torch.Generator().manual_seed(10)
    make = lambda: torch.randn(4, WIDTH, generator=draw)  # noqa: E731
    batches = [(make(), make()) for _ in range(count)]
    batches[9][1].fill_(math.inf)  # every stage skips that batch's update
    return batches


def optimizer_of(kind, params):
    make = getattr(torch.optim, kind) if hasattr(torch.optim, kind) else load(kind)
    return lambda parameters: make(parameters, **params)


def cases(stages):
    """name -> (K, policy, extra in flight, optimizer, what happens after call 11)."""
    found = {}
    for gas in (1, 2):
        for name, optimizer in (("SGD", SGD), ("NAdamW", NADAMW), ("Muon", MUON)):
            found[f"{name} K={gas}"] = (gas, "stash", 0, optimizer, None)
        found[f"latest K={gas}"] = (gas, "latest", 0, NADAMW, None)
        found[f"drained K={gas}"] = (gas, "stash", 0, NADAMW, "drain")
        found[f"another K than {gas}"] = (gas, "stash", 0, NADAMW, f"K={3 - gas}")
    found["more in flight"] = (2, "stash", 3, SGD, "drain")
    found["drained before any is known"] = (1, "stash", 0, SGD, "early drain")
    return found


def happens(between, call):
    if between == "early drain":
        return "drain" if call == 2 else None
    return between if call == 11 else None


def train(rank, stages, name):
    from noflush.stage.plain import PlainStage
    from noflush.stage.work import StageOptions

    gas, weights, extra, optimizer, between = cases(stages)[name]
    module = layers(stages)[rank]
    losses, told = [], []

    def loss_fn(outputs, labels):
        loss = nn.functional.mse_loss(outputs, labels)
        losses.append(loss.item())
        return loss

    stage = PlainStage(
        Schedule(stages, gas, weights=weights, extra_in_flight=extra),
        module,
        loss_fn,
        optimizer_of(*optimizer)(module.parameters()),
        max_norm=CLIP,
        options=StageOptions(late_norm=True),
    )
    stream = iter(data(2 * CALLS))
    for call in range(CALLS):
        stage.train_on(stream)
        told.append(stage.norm.newest)
        happening = happens(between, call)
        if happening == "drain":
            stage.drain()
        elif happening:
            stage.change_gas(int(happening[2:]))
    stage.drain()
    return {"losses": losses, "weights": [p.detach().clone() for p in module.parameters()], "told": told}


def train_all(rank, stages):
    return {name: train(rank, stages, name) for name in cases(stages)}


@functools.cache
def trained(stages):
    return run_ranks(train_all, stages, timeout=280, stages=stages)


def simulate(stages, name, clip_by="lagged_global"):
    """(losses, the simulator, what every stage is told in each call: the batch's call, and its norm)."""
    gas, weights, extra, optimizer, between = cases(stages)[name]
    schedule = Schedule(stages, gas, weights=weights, extra_in_flight=extra)
    simulator = DelaySimulator(
        layers(stages), nn.functional.mse_loss, optimizer_of(*optimizer), schedule, CLIP, clip_by=clip_by
    )
    stream, losses, told, newest, first = iter(data(2 * CALLS)), [], [], None, 0
    for call in range(CALLS):
        losses += [simulator.train_micro_batch(*next(stream)).item() for _ in range(simulator.schedule.gas)]
        batch = known_batch(simulator.schedule, call - first)
        if batch >= 0 and math.isfinite(simulator.norms[batch]):
            newest = (first + batch + 1, simulator.norms[batch])
        told.append(newest)
        happening = happens(between, call)
        if happening == "drain":
            simulator.drain()
        elif happening:
            simulator.change_gas(int(happening[2:]))
        if happening:
            first = call + 1
    simulator.drain()
    return losses, simulator, told


@pytest.mark.parametrize(
    ("stages", "name"),
    [
        pytest.param(stages, name, marks=[pytest.mark.slow] * (stages == 2))
        for stages in (2, 3, 4)
        for name in cases(stages)
    ],
)
def test_the_stages_are_the_simulator(stages, name):
    losses, simulator, told = simulate(stages, name)
    results = [result[name] for result in trained(stages)]
    assert results[-1]["losses"] == pytest.approx(losses, abs=0, nan_ok=True)
    for s, result in enumerate(results):
        for found, expected in zip(result["weights"], simulator.parameters(s).values(), strict=True):
            assert torch.equal(found, expected)
        assert [None if one is None else (one.step, one.norm) for one in result["told"]] == told
    assert len(simulator.skipped) == stages
    # Something was clipped, and otherwise than by the stages' own norms.
    assert losses[-1] != simulate(stages, name, "stage")[0][-1]


ZERO, BF16 = {"zero_optimization": {"stage": 1}}, {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "loss_scale": 1024.0}} | ZERO
ENGINE_CASES = {
    "float32": ({}, LATE, Precision()),
    "float32 ZeRO-1": (ZERO, LATE, Precision()),
    "bf16 ZeRO-1": (BF16 | ZERO, LATE, Precision(torch.bfloat16)),
    "fp16": (FP16, LATE, Precision(torch.float16)),
    "the twin": ({}, LATE | {"schedule": "1f1b_flush"}, Precision()),
}


def train_engines(rank, stages):
    found = {}
    for name, (more, block, _) in ENGINE_CASES.items():
        norms = []
        config = t.ds_config(2, t.NADAMW, block, **more | {"gradient_clipping": 0.05})
        note = lambda engine, call, norms=norms: norms.append(engine.pipeline_norm)  # noqa: E731
        found[name] = t.train(rank, stages, 2, 12, config, between=note) | {"norms": norms}
    return found


def test_the_engine_is_the_simulator_in_every_precision():
    stages = 2
    results = run_ranks(train_engines, stages, timeout=200, stages=stages)
    for name, (more, block, precision) in ENGINE_CASES.items():
        scale = more.get("fp16", {}).get("loss_scale", 1.0)
        losses, weights = t.simulate(
            stages, 2, 12, t.torch_nadam, block, clip=0.05, precision=precision, clip_by="lagged_global",
            loss_scale=lambda batch, scale=scale: scale,
        )  # fmt: skip
        runs = [result[name] for result in results]
        if name == "the twin":  # whose one norm is summed up in another order
            assert runs[-1]["losses"] == pytest.approx(losses, rel=1e-5)
        else:
            t.assert_same(runs, losses, weights)
        assert all(run["norms"] == runs[0]["norms"] for run in runs)
        assert runs[0]["norms"][-1].step == 12 - 3 - (0 if "schedule" in block else 1)


def sharded(rank):
    config = t.ds_config(2, t.NADAMW, LATE, **ZERO, gradient_clipping=0.05)
    return t.train(rank, 2, 2, 10, config)


def test_replicas_and_their_shards():
    results = run_ranks(sharded, 4)
    losses, weights = t.simulate(2, 2, 10, t.torch_nadam, clip=0.05, replicas=2, clip_by="lagged_global")
    for replica in range(2):
        runs = [results[replica], results[2 + replica]]
        assert runs[-1]["losses"] == pytest.approx(losses[replica], rel=1e-5)
        for run, expected in zip(runs, weights, strict=True):
            for got, want in zip(run["weights"], expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
