"""A checkpoint goes on with other stages or replicas: weights, masters and moments, by the names of parameters.

With the flush the number of stages changes no number, so the run that goes on without a change is the oracle, to the
bit; without it, the delay simulator started from the checkpoint's own state.
"""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from torch import nn

from noflush.demo.gpt import next_token_loss, split_by_blocks
from noflush.methods import DelayAwareNAdamW
from noflush.methods.method import Method
from noflush.order.schedule import Schedule
from noflush.simulate import DelaySimulator
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks
from tests.multiproc.test_nonfinite import allow_fp16

pytestmark = pytest.mark.multiproc

MUON = {"type": "DelayAwareMuon", "params": {"lr": 3e-3, "look_ahead": 0.5}}
NAG = {"type": "DelayAwareNAG", "params": {"lr": 3e-3}}
SOAP = {"type": "DelayAwareSOAP", "params": {"lr": 3e-3, "refresh_every": 3}}
SOAP_OF_MOMENT = {"type": "DelayAwareSOAP", "params": {**SOAP["params"], "estimate": "first"}}
WARM_UP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 20}}}
ZERO = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}
FLUSH = {"schedule": "1f1b_flush"}
SAVED, CALLS = 4, 8
CASES = {
    "NAdamW": (t.NADAMW, {}),
    "torch's AdamW": (t.ADAMW, {}),
    "NAG": (NAG, {}),
    "SOAP": (SOAP, {}),
    "bf16, SOAP": (SOAP, BF16),
    "ZeRO-1, SOAP of the first moment": (SOAP_OF_MOMENT, ZERO),
    "bf16, Muon": (MUON, BF16),
    "ZeRO-1": (t.NADAMW, ZERO),
    "ZeRO-1, AdamW of torch's": (t.ADAMW, ZERO),
    # A scale that grows by then, and never overflows.
    "fp16": (t.NADAMW, ZERO | {"fp16": {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2}}),
}


def losses_of(engine, data, calls):
    return [engine.train_batch(data).item() for _ in range(calls)]


def scale_of(engine):
    return engine.optimizer.loss_scaler.cur_scale if engine.fp16_enabled() else None


def save_and_go_on(rank, folder, stages, gas=2, block=FLUSH, names=tuple(CASES)):
    allow_fp16()
    found = {}
    for name in names:
        optimizer, more = CASES[name]
        engine = t.build(stages, t.ds_config(gas, optimizer, block, **WARM_UP, **more))
        replicas = engine.dp_world_size
        data = itertools.islice(
            iter(t.data(CALLS * gas * replicas)), engine.grid.get_data_parallel_rank(), None, replicas
        )
        before = losses_of(engine, data, SAVED)
        engine.save_checkpoint(f"{folder}/{name}", client_state={"words": "of the script"})
        scale = scale_of(engine)
        found[name] = before, losses_of(engine, data, CALLS - SAVED), engine.get_lr(), scale
    return found


def go_on(rank, folder, stages, gas=2, block=FLUSH, names=tuple(CASES), cut="type:Block"):
    allow_fp16()
    found, said = {}, []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("noflush").addHandler(handler)
    for name in names:
        optimizer, more = CASES[name]
        engine = t.build(stages, t.ds_config(gas, optimizer, block, **WARM_UP, **more), cut=cut)
        replicas = engine.dp_world_size
        losses_of(engine, iter(t.data(2 * gas, seed=9)), 2)
        _, client = engine.load_checkpoint(f"{folder}/{name}")
        assert client["words"] == "of the script"
        assert not any(key.startswith("noflush") for key in client)
        assert (engine.global_steps, engine.updates) == (SAVED, SAVED)
        data, scale = iter(t.data(CALLS * gas * replicas)), scale_of(engine)
        data = itertools.islice(data, SAVED * gas * replicas + engine.grid.get_data_parallel_rank(), None, replicas)
        losses = losses_of(engine, data, CALLS - SAVED)
        found[name] = losses, engine.get_lr(), scale
    return found, [record.getMessage() for record in said if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("stages", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_other_stages_change_no_number_of_a_run_that_flushes(stages, tmp_path):
    whole = run_ranks(save_and_go_on, 4, timeout=200, folder=str(tmp_path), stages=4)[-1]
    results = run_ranks(go_on, stages, timeout=200, folder=str(tmp_path), stages=stages)
    for name in CASES:
        losses, rate, scale = results[-1][0][name]
        assert losses == whole[name][1], name
        assert rate[0] == whole[name][2][0], name
        assert scale == whole[name][3], name
    assert whole["fp16"][3] > 2**6
    lines = results[0][1]
    assert len(lines) == len(CASES)
    assert f"was written by 4 stages: re-cut by layer for {stages} stages of 1; the pipeline fills anew" in lines[0]
    assert "written by 4 stages of 1 replicas" in lines[-1]


OLDER = {"torch's AdamW", "ZeRO-1"}


def test_as_many_stages_with_other_layers_too(tmp_path):
    """Of 6 layers 2, 1, 1, 2 a stage, and 2, 2, 1, 1: some stages keep theirs, and some their number of parameters.

    Older checkpoints do not say where they were cut, but name the parameters of a stage.
    """
    whole = run_ranks(save_and_go_on, 4, timeout=200, folder=str(tmp_path), stages=4)[-1]
    for name in OLDER:
        for path in (tmp_path / name).glob("*/mp_rank_*_model_states.pt"):
            file = torch.load(path, weights_only=False)
            assert file.pop("noflush_parts") == [0, 2, 3, 4, 6]
            torch.save(file, path)
    results = run_ranks(go_on, 4, timeout=200, folder=str(tmp_path), stages=4, cut="uniform")
    for name in CASES:
        losses, rate, scale = results[-1][0][name]
        assert losses == whole[name][1], name
        assert (rate[0], scale) == (whole[name][2][0], whole[name][3]), name
    lines = results[0][1]
    assert len(lines) == len(CASES)
    assert "was written by 4 stages that had other layers: re-cut by layer for 4 stages of 1" in lines[0]


@pytest.mark.parametrize(("before", "after"), [pytest.param(2, 1, marks=pytest.mark.slow), (1, 2)])
def test_other_replicas_too(before, after, tmp_path):
    """The same samples, in other sums: equal to a float's rounding."""
    names = ("ZeRO-1", "NAdamW", "ZeRO-1, SOAP of the first moment")
    more = {"folder": str(tmp_path), "stages": 2, "names": names}
    whole = run_ranks(save_and_go_on, 2 * before, gas=2 // before, **more)[-1]
    results = run_ranks(go_on, 2 * after, gas=2 // after, **more)
    for name in names:
        assert results[-1][0][name][0] == pytest.approx(whole[name][1], abs=1e-5)
        assert results[-1][0][name][0] != whole[name][0]


def presets(folder, parts):
    """What a stage's optimizer starts from: state by name, from the files of all old stages."""
    states = {}
    for path in sorted(folder.glob("mp_rank_*_model_states.pt")):
        file = torch.load(path, weights_only=False)
        states |= {file["noflush_parameters"][n]: state for n, state in file["optimizer"]["state"].items()}
    flat = [layer for part in parts for layer in part]
    for number, layer in enumerate(flat):
        layer.load_state_dict(torch.load(next(folder.glob(f"layer_{number:02d}-*")), weights_only=False))
    names = iter([f"{number}.{name}" for number, layer in enumerate(flat) for name, _ in layer.named_parameters()])

    def make_optimizer(params):
        params = list(params)
        rule = DelayAwareNAdamW(params, lr=1e-3, betas=(0.99, 0.999), weight_decay=0.01)
        for p in params:
            rule.state[p] = {key: value.clone() for key, value in states[next(names)].items()}
        return rule

    return make_optimizer


def save_constant_rate(rank, folder):
    engine = t.build(4, t.ds_config(1, RATE, {}))
    losses_of(engine, iter(t.data(SAVED)), SAVED)
    engine.drain()
    engine.save_checkpoint(folder)


def go_on_at_a_constant_rate(rank, folder, stages):
    engine = t.build(stages, t.ds_config(1, RATE, {}))
    engine.load_checkpoint(folder)
    losses = losses_of(engine, itertools.islice(iter(t.data(12)), SAVED, None), 12 - SAVED)
    engine.drain()
    return losses, [p.detach().clone() for p in engine.module.parameters()]


RATE = {"type": "DelayAwareNAdamW", "params": {"lr": 1e-3, "betas": [0.99, 0.999], "weight_decay": 0.01}}


def test_without_a_flush_it_goes_on_as_the_simulator_does_from_that_state(tmp_path):
    run_ranks(save_constant_rate, 4, folder=str(tmp_path))
    results = run_ranks(go_on_at_a_constant_rate, 2, folder=str(tmp_path), stages=2)
    parts = split_by_blocks(t.layers(), 2)
    simulator = DelaySimulator(parts, next_token_loss, presets(tmp_path / "global_step4", parts), Schedule(2, 1))
    losses = [simulator.train_micro_batch(*batch).item() for batch in t.data(12)[SAVED:]]
    simulator.drain()
    assert results[-1][0] == losses
    for stage, (_, weights) in enumerate(results):
        for got, want in zip(weights, simulator.parameters(stage).values(), strict=True):
            assert torch.equal(got, want)


BF16_RUN = {"gas": 2, "optimizer": {"type": "DelayAwareNAdamW", "params": {"lr": 3e-3}}, "block": {}, **BF16}


def save_bf16(rank, folder):
    engine = t.build(4, t.ds_config(**BF16_RUN))
    losses_of(engine, iter(t.data(2 * SAVED)), SAVED)
    engine.save_checkpoint(folder)


def weights_alone(rank, folder):
    """Weights as they are just loaded, and after an update whose rate is 0."""
    engine = t.build(2, t.ds_config(**BF16_RUN))
    engine.load_checkpoint(folder, load_module_only=True)
    loaded = [p.detach().clone() for p in engine.module.parameters()]
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    losses_of(engine, iter(t.data(2)), 1)
    engine.drain()
    return loaded, [p.detach().clone() for p in engine.module.parameters()], engine.updates


def test_weights_alone_reach_the_masters_of_other_stages(tmp_path):
    """An update of rate 0 leaves the weights that were loaded: it would write what the masters were before."""
    run_ranks(save_bf16, 4, folder=str(tmp_path))
    results = run_ranks(weights_alone, 2, folder=str(tmp_path))
    folder = tmp_path / f"global_step{SAVED}"
    layers = [torch.load(path, weights_only=False) for path in sorted(folder.glob("layer_*"))]
    saved = [value for layer in layers for value in layer.values()]
    found = [p for result in results for p in result[0]]
    assert len(saved) == len(found)
    for loaded, after, updates in results:
        assert updates == 1
        assert all(torch.equal(a, b) for a, b in zip(loaded, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, saved, strict=True))


class Uneven(nn.Module):
    """Matrices of sizes that no two or three shards share out evenly, and an odd number of others."""

    def __init__(self, width=8):
        super().__init__()
        self.a, self.b = nn.Linear(width, 3 * width, bias=False), nn.Linear(3 * width, width, bias=False)
        self.c, self.gain = nn.Linear(width, width, bias=False), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.c(self.b(torch.relu(self.a(x)))) * self.gain + x


class End(Uneven):
    """The last layer; one number more."""

    def __init__(self, width=8):
        super().__init__(width)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return super().forward(x) + self.shift.sum()


def uneven(optimizer, more):
    torch.manual_seed(3)
    loss = torch.nn.functional.mse_loss
    layers = [Uneven(), Uneven(), End()]
    module = PipelineModule(layers=layers, num_stages=1, loss_fn=loss)
    config = t.ds_config(2, optimizer, FLUSH, **more) | {"train_micro_batch_size_per_gpu": 2}
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine


def pairs(engine, calls, done=0):
    draw, dtype = torch.Generator().manual_seed(5), next(engine.module.parameters()).dtype
    replicas, mine = engine.dp_world_size, engine.grid.get_data_parallel_rank()
    batches = [tuple(torch.randn(2, 2, 8, generator=draw).to(dtype)) for _ in range(calls * 4)]
    return iter(batches[done * 4 + mine :: replicas])


UNEVEN = {
    "NAdamW": (t.NADAMW, ZERO),
    "Muon": (MUON, ZERO),
    "SOAP": (SOAP, ZERO),
    "SOAP of the first moment": (SOAP_OF_MOMENT, ZERO),
    "bf16, SOAP": (SOAP, BF16),
}


def save_uneven(rank, folder, name, shared_out=None):
    if shared_out is not None:
        Method.cost = shared_out
    engine = uneven(*UNEVEN[name])
    engine.set_train_batch_size(8)
    data = pairs(engine, CALLS)
    losses_of(engine, data, SAVED)
    engine.save_checkpoint(folder)
    return losses_of(engine, data, CALLS - SAVED)


def go_on_uneven(rank, folder, name):
    said = []
    logging.getLogger("noflush").addHandler(type("Kept", (logging.Handler,), {"emit": lambda _, r: said.append(r)})())
    engine = uneven(*UNEVEN[name])
    engine.set_train_batch_size(8)
    engine.load_checkpoint(folder)
    losses = losses_of(engine, pairs(engine, CALLS, done=SAVED), CALLS - SAVED)
    return losses, [record.getMessage() for record in said if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("NAdamW", "SOAP"))) for name in UNEVEN]
)
def test_shards_with_gaps_and_padding_too(name, tmp_path):
    """2 replicas share three layers out with a gap, and 1 has a number of weights that ZeRO pads."""
    # Other sums; SOAP's basis of the first moment, found anew in the last update but one, makes more of them.
    first, rest = (2e-2, 2e-2) if "bf16" in name else (1e-6, 1e-3)
    for before, after in ((2, 1), (1, 2)):
        folder = str(tmp_path / str(before))
        whole = run_ranks(save_uneven, before, folder=folder, name=name)[0]
        (losses, _), *_ = run_ranks(go_on_uneven, after, folder=folder, name=name)
        assert losses[:2] == pytest.approx(whole[:2], abs=first)
        assert losses == pytest.approx(whole, abs=rest)


@pytest.mark.parametrize("name", ["Muon", "SOAP"])
def test_shards_that_were_shared_out_by_another_measure_are_recut(name, tmp_path):
    """As another release of noflush may do it; DeepSpeed loads a shard by place."""
    folder = str(tmp_path)
    whole = run_ranks(save_uneven, 2, folder=folder, name=name, shared_out=smallest_first)[0]
    (losses, lines), *_ = run_ranks(go_on_uneven, 2, folder=folder, name=name)
    assert losses == pytest.approx(whole, abs=1e-4)
    assert "2 replicas that shared matrices out otherwise: re-cut by layer for 1 stages of 2" in lines[0]


def smallest_first(method, shape):
    return 1 / (shape[0] * shape[1])


def square_from_an_older_one(rank, folder):
    module = PipelineModule(layers=[nn.Linear(8, 8)] * 2, num_stages=1, loss_fn=nn.functional.mse_loss)
    config = t.ds_config(2, SOAP, FLUSH, **ZERO) | {"train_micro_batch_size_per_gpu": 2}
    engine, *_ = deepspeed.initialize(model=module, config=config)
    losses_of(engine, pairs(engine, 2), 2)
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    (path,) = Path(folder).glob("*/mp_rank_00_model_states.pt")
    file = torch.load(path, weights_only=False)
    assert "row_basis" in file.pop("noflush_state_spans")["0.weight"]
    torch.save(file, path)
    engine.load_checkpoint(folder)


def test_state_of_square_matrices_alone_of_an_older_release_is_refused(tmp_path):
    """It lay as the matrices did."""
    ((kind, message),) = run_ranks(square_from_an_older_one, 1, expect_errors=True, folder=str(tmp_path))
    assert kind == "CheckpointError"
    assert "is of an older noflush, which kept state of square matrices in another order" in message


def refused(rank, folder, **params):
    section = SOAP_OF_MOMENT | {"params": SOAP_OF_MOMENT["params"] | params}
    t.build(2, t.ds_config(2, section, FLUSH, **ZERO)).load_checkpoint(folder)


def save_soap(rank, folder):
    engine = t.build(2, t.ds_config(2, SOAP_OF_MOMENT, FLUSH, **ZERO))
    losses_of(engine, iter(t.data(4)), 2)
    engine.save_checkpoint(folder)


def test_what_cannot_be_recut_is_refused(tmp_path):
    """Bases of another form; and files that do not say where a matrix's state lies."""
    run_ranks(save_soap, 4, folder=str(tmp_path))
    for kind, message in run_ranks(refused, 2, expect_errors=True, folder=str(tmp_path), estimate="second"):
        assert kind == "CheckpointError"
        assert "has 0 numbers of col_covariance of " in message
    for path in tmp_path.glob("*/mp_rank_*_model_states.pt"):
        file = torch.load(path, weights_only=False)
        del file["noflush_state_spans"]
        torch.save(file, path)
    for kind, message in run_ranks(refused, 2, expect_errors=True, folder=str(tmp_path)):
        assert kind == "CheckpointError"
        assert "lies in a shard by matrices, and an older noflush did not write down where" in message
