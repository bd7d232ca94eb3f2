"""Updates that meet gradients which are not finite, and fp16's travelling loss scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from noflush.order.wire_format import Wire
from noflush.simulate import Precision
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

ZERO = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 22, "loss_scale_window": 6, "hysteresis": 1}}
CALLS = 14


class _Spoil(torch.autograd.Function):
    """The identity, whose gradient is infinite at some backwards."""

    @staticmethod
    def forward(ctx, weight, layer):
        ctx.layer = layer
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.layer.backwards += 1
        return (gradient * float("inf") if ctx.layer.backwards in ctx.layer.spoilt else gradient), None


class Block(nn.Module):
    """A block with a scale of its own, whose gradient can be spoilt; the gradient it passes on never is."""

    def __init__(self, block, spoilt):
        super().__init__()
        self.block, self.spoilt, self.backwards = block, spoilt, 0
        self.scale = nn.Parameter(torch.ones(t.GPT["width"]))

    def forward(self, x):
        return self.block(x) * _Spoil.apply(self.scale, self)


def spoilt_layers(spoilt):
    """Makes layers; ``spoilt``: number of a block -> its spoilt backwards, counted from 1."""

    def make(gpt=None):
        layers = t.layers(gpt)
        return [layers[0], *(Block(b, spoilt.get(i, ())) for i, b in enumerate(layers[1:-1])), layers[-1]]

    return make


ONE_STAGE_EACH = spoilt_layers({1: (3, 4), 2: (6,)})
CASES = {
    "float32, noflush's": (1, t.NADAMW, {}, t.torch_nadam, Precision()),
    "float32, DeepSpeed's": (1, t.ADAMW, {}, t.adamw, Precision()),
    "float32 ZeRO-1, noflush's": (1, t.NADAMW, ZERO, t.torch_nadam, Precision()),
    "float32 ZeRO-1, DeepSpeed's": (1, t.ADAMW, ZERO, t.adamw, Precision()),
    "bf16, noflush's": (2, t.NADAMW, BF16, t.torch_nadam, Precision(torch.bfloat16)),
    "bf16, DeepSpeed's": (2, t.ADAMW, BF16, t.adamw, Precision(torch.bfloat16)),
    "bf16 ZeRO-1, DeepSpeed's": (1, t.ADAMW, BF16 | ZERO, t.adamw, Precision(torch.bfloat16)),
}


def train_spoilt(rank, stages):
    results = {}
    for name, (gas, optimizer, more, _, _) in CASES.items():
        engines = []
        config = t.ds_config(gas, optimizer, {}, **more, scheduler=t_schedule())
        results[name] = t.train(
            rank, stages, gas, CALLS, config, between=lambda e, _: engines.append(e),  # noqa: B023
            make_layers=ONE_STAGE_EACH,
        )  # fmt: skip
        engines[-1].pipeline_stage.guard.notices(before=10**9)
        results[name]["skips"] = engines[-1].pipeline_stage.guard.skips.total
    return results


def t_schedule():
    return {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 6}}


def warm_up(optimizer):
    from deepspeed.runtime.lr_schedules import WarmupLR

    return WarmupLR(optimizer, warmup_max_lr=3e-3, warmup_num_steps=6)


@pytest.mark.parametrize(("stages", "replicas"), [pytest.param(2, 1, marks=pytest.mark.slow), (2, 2)])
def test_a_skipped_update_loses_nothing_and_training_goes_on(stages, replicas):
    """Only the stage that met the infinity skips; versions, weights, rates and losses are the simulator's."""
    results = run_ranks(train_spoilt, stages * replicas, timeout=200, stages=stages)
    for name, (gas, _, _, make_optimizer, precision) in CASES.items():
        skipped = []
        losses, weights = t.simulate(
            stages, gas, CALLS, make_optimizer, make_layers=ONE_STAGE_EACH_SIMULATED[replicas], precision=precision,
            make_lr=warm_up, found=skipped, replicas=replicas,
        )  # fmt: skip
        runs = [r[name] for r in results]
        for replica in range(replicas):
            mine = losses[replica] if replicas > 1 else losses
            t.assert_same(runs[replica::replicas], mine, weights)
        assert skipped, name
        for rank, run in enumerate(runs):
            assert run["skips"] == sum(stage == rank // replicas for stage, _ in skipped), name
            assert run["updates"] == CALLS


# Of two replicas the simulator runs one after the other through the same layer: its count runs twice as fast.
ONE_STAGE_EACH_SIMULATED = {
    1: ONE_STAGE_EACH,
    2: spoilt_layers({1: (5, 6, 7, 8), 2: (11, 12)}),
}


def train_until_stopped(rank, folder, resume, background=False):
    spoilt = spoilt_layers({} if resume else {1: tuple(range(4, 99))})
    block = {"max_skipped_updates": 3, "async_save": background}
    engine = t.build(4, t.ds_config(1, block=block), make_layers=spoilt)
    data = t.data(40)
    if resume:
        engine.load_checkpoint(folder, tag=resume)
        step, updates = engine.global_steps, engine.updates
        weights = [p.detach().clone() for p in engine.module.parameters()]
        engine.train_batch(iter(data[step : step + 1]))
        return step, updates, weights
    engine.save_checkpoint(folder)
    kept = []
    for call in range(40):
        engine.train_batch(iter(data[call : call + 1]))
        if engine.updates == 3:
            kept = [p.detach().clone() for p in engine.module.parameters()]
            Path(folder, f"kept{rank}.pt").write_bytes(b"")
            torch.save(kept, Path(folder, f"kept{rank}.pt"))
    return "never stopped"


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow, id="in the background")])
def test_too_many_in_a_row_stop_all_stages_with_a_checkpoint(background, tmp_path):
    more = {"folder": str(tmp_path), "resume": None, "background": background}
    results = run_ranks(train_until_stopped, 4, expect_errors=True, **more)
    for kind, message in results:
        assert kind == "NonFiniteGradients"
        assert "stage 1 skipped 3 updates in a row (max_skipped_updates allows 3)" in message
        assert str(tmp_path) in message
    (tag,) = {Path(m.split("saved in ")[1].split(". ")[0]).name for _, m in results}
    assert Path(tmp_path, "latest").read_text() == "global_step0"  # a run may go back to what it saved itself
    loaded = run_ranks(train_until_stopped, 4, folder=str(tmp_path), resume=tag)
    assert len({(step, updates) for step, updates, _ in loaded}) == 1
    # Stage 1 has the weights of before the first infinity; the others went on.
    for stage, (_, _, weights) in enumerate(loaded):
        before = torch.load(tmp_path / f"kept{stage}.pt")
        assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True)) == (stage == 1)


def allow_fp16():
    """DeepSpeed asks the CPU for a fast fp16; torch computes it without, slowly."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


FP16_CASES = {
    "noflush's K=1": (1, t.NADAMW, {}, t.torch_nadam, 0.0, "model"),
    "DeepSpeed's K=2": (2, t.ADAMW, {}, t.adamw, 0.0, "model"),
    "noflush's K=2, clipped": (2, t.NADAMW, {"gradient_clipping": 0.05}, t.torch_nadam, 0.05, "model"),
    "noflush's K=1, coded": (1, t.NADAMW, {}, t.torch_nadam, 0.0, "int8"),
}


def train_fp16(rank, stages):
    from noflush.stage.loss_scale import TravellingScale

    allow_fp16()
    results = {}
    for name, (gas, optimizer, more, _, _, wire) in FP16_CASES.items():
        scales = {}
        begin = TravellingScale.begin

        def noted(self, batch, begin=begin, scales=scales):
            scales[batch] = begin(self, batch)
            return scales[batch]

        TravellingScale.begin = noted
        engines = []
        config = t.ds_config(gas, optimizer, {"wire": wire}, **FP16 | ZERO | more)
        results[name] = t.train(rank, stages, gas, 40, config, between=lambda e, _: engines.append(e))  # noqa: B023
        TravellingScale.begin = begin
        engines[-1].pipeline_stage.guard.notices(before=10**9)
        results[name] |= {"scales": scales, "skips": engines[-1].pipeline_stage.guard.skips.total}
    return results


@pytest.mark.parametrize(
    ("stages", "replicas"), [*(pytest.param(p, 1, marks=pytest.mark.slow) for p in (2, 4)), (2, 2)]
)
def test_fp16_equals_the_simulator_with_the_same_scales(stages, replicas):
    results = run_ranks(train_fp16, stages * replicas, timeout=200, stages=stages)
    for name, (gas, _, _, make_optimizer, clip, wire) in FP16_CASES.items():
        if replicas > 1 and not name.startswith("noflush's K=1"):
            # DeepSpeed takes the replicas' mean in fp16, where halving rounds what is subnormal; and the norm of two
            # shards rounds otherwise than the norm of the whole.
            continue
        runs = [r[name] for r in results]
        scales = runs[-1]["scales"]
        skipped = []
        losses, weights = t.simulate(
            stages, gas, 40, make_optimizer, clip=clip, precision=Precision(torch.float16), replicas=replicas,
            loss_scale=scales.__getitem__, found=skipped, wire=Wire.read(wire),
        )  # fmt: skip
        for replica in range(replicas):
            t.assert_same(runs[replica::replicas], losses[replica] if replicas > 1 else losses, weights)
        assert [run["skips"] for run in runs] == [
            sum(stage == rank // replicas for stage, _ in skipped) for rank in range(stages * replicas)
        ]
        # The first scales overflow, it falls until none does, and after a good window it grows again.
        values = list(scales.values())
        assert len(values) == 40
        assert skipped
        assert min(values) < values[0] == 2.0**22
        low = values.index(min(values))
        assert max(values[low:]) > min(values)
