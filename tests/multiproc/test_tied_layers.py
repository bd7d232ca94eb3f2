"""DeepSpeed's tied layers without a flush: the delay simulator's numbers, checkpoints, and a save that stock loads."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn

from noflush.demo.gpt import Block, Embedding, Head, next_token_loss
from noflush.methods.table import load
from noflush.order.schedule import Schedule
from noflush.simulate import DelaySimulator, Precision, Shared
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc
GPT, DEPTH, CALLS = t.GPT, 4, 8
NADAMW = {"type": "DelayAwareNAdamW", "params": {"lr": 3e-3, "weight_decay": 0.01, "look_ahead": 0.9}}
MUON = {"type": "DelayAwareMuon", "params": {"lr": 3e-3, "look_ahead": 0.9}}
BF16 = {"bf16": {"enabled": True}}
ZERO = {"zero_optimization": {"stage": 1}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
SUMS_IN_FP32 = Precision(torch.bfloat16, torch.float32, torch.bfloat16)
PARTS = {2: [0, 4, 7], 3: [0, 3, 5, 7]}


class Words(Embedding):
    """An embedding that can be a head too."""

    @property
    def words(self):
        return self.token.weight


def as_head(embedding, hidden):
    return nn.functional.linear(hidden, embedding.words)


def seeded(seed, kind, *args):
    torch.manual_seed(seed)
    return kind(*args)


def build(stages, config):
    import deepspeed
    from deepspeed.pipe import PipelineModule, TiedLayerSpec

    sizes = GPT["vocabulary"], GPT["sequence"], GPT["width"]
    words = functools.partial(seeded, 1, Words)
    tied = {"tied_weight_attr": "words"}

    class Tied(TiedLayerSpec):
        def build(self, log=False):
            return words(*self.module_args)

    specs = [
        Tied("embed", Words, *sizes, **tied),
        *(seeded(10 + i, Block, GPT["width"], GPT["heads"], DEPTH) for i in range(DEPTH)),
        nn.LayerNorm(GPT["width"]),
        Tied("embed", Words, *sizes, forward_fn=as_head, **tied),
    ]
    loss_fn, losses = t.recording()
    module = PipelineModule(layers=specs, num_stages=stages, loss_fn=loss_fn, partition_method="uniform")
    assert module.parts == PARTS[stages]
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine, losses


def simulator_parts(stages):
    sizes = GPT["vocabulary"], GPT["sequence"], GPT["width"]
    blocks = [seeded(10 + i, Block, GPT["width"], GPT["heads"], DEPTH) for i in range(DEPTH)]
    head = Head(GPT["width"], GPT["vocabulary"])
    head.norm = nn.LayerNorm(GPT["width"])
    layers = [seeded(1, Embedding, *sizes), *blocks, head]  # the head is two of DeepSpeed's layers
    return [nn.Sequential(*layers[a:b]) for a, b in itertools.pairwise([*PARTS[stages][:-1], len(layers)])]


CASES = {
    "float32 K=1": (1, {}, NADAMW, Precision(), 1),
    "float32 K=2": (2, {}, NADAMW, Precision(), 1),
    "Muon": (1, {}, MUON, Precision(), 1),
    "torch's AdamW": (1, {}, t.ADAMW, Precision(), 1),
    "bf16": (1, BF16, NADAMW, Precision(torch.bfloat16), 1),
    "bf16 ZeRO-1": (2, BF16 | ZERO, NADAMW, Precision(torch.bfloat16), 1),
    "float32 ZeRO-1": (1, ZERO, MUON, Precision(), 1),
    "bf16, K=3": (3, BF16, NADAMW, Precision(torch.bfloat16), 1),
    "bf16, fp32 sums, ZeRO-1": (3, BF16 | ZERO | FP32_SUMS, NADAMW, SUMS_IN_FP32, 1),
}


def train(rank, stages, folder):
    results = {}
    for name, (gas, more, optimizer, _, _) in CASES.items():
        engine, losses = build(stages, t.ds_config(gas, optimizer, {}, **more))
        stream = iter(t.data(400))
        for call in range(CALLS):
            engine.train_batch(itertools.islice(stream, gas))
            if call == 3:
                engine.save_checkpoint(f"{folder}/{name}")
            if call == 5:
                engine.eval_batch(iter(t.data(2, seed=9)), num_micro_batches=2)
        engine.drain()
        weights = {of: p.detach().clone() for of, p in engine.module.named_parameters()}
        # A new engine that goes on from the save.
        again, _ = build(stages, t.ds_config(gas, optimizer, {}, **more))
        again.load_checkpoint(f"{folder}/{name}")
        stream = itertools.islice(iter(t.data(400)), 4 * gas, None)
        for _ in range(CALLS - 4):
            again.train_batch(itertools.islice(stream, gas))
        again.drain()
        same = all(torch.equal(weights[of], p) for of, p in again.module.named_parameters() if "position" not in of)
        results[name] = losses, weights, same
    return results


@functools.cache
def trained(stages, folder):
    return run_ranks(train, stages, timeout=280, stages=stages, folder=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tied"))


def expected(stages, name):
    gas, _, section, precision, _ = CASES[name]
    parts = simulator_parts(stages)
    reader = f"{len(parts[-1]) - 1}.logits.weight"
    functools.reduce(getattr, reader.split("."), parts[-1]).data.copy_(parts[0][0].token.weight)
    params = {key: value for key, value in section["params"].items() if key != "torch_adam"}
    rule = torch.optim.AdamW if section is t.ADAMW else load(section["type"])
    simulator = DelaySimulator(
        parts, next_token_loss, lambda ps: rule(ps, **params), Schedule(stages, gas), precision=precision,
        shared=[Shared(((0, "0.token.weight"), (stages - 1, reader)))],
    )  # fmt: skip
    losses = []
    for batch in t.data(CALLS * gas):
        losses.append(simulator.train_micro_batch(*batch).item())
    simulator.drain()
    return losses, simulator


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stages", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_tied_layers_are_the_simulator_and_go_on(stages, name, folder):
    losses, simulator = expected(stages, name)
    results = [result[name] for result in trained(stages, folder)]
    assert results[-1][0] == losses
    owned = simulator.parameters(0)["0.token.weight"]
    for s in (0, stages - 1):
        found = [w for of, w in results[s][1].items() if of.endswith("token.weight")]
        assert [torch.equal(w, owned) for w in found] == [True]
    assert all(same for _, _, same in results)


REPLICAS = {
    "float32": ({}, Precision(), 2),
    "bf16 ZeRO-1": (BF16 | ZERO, Precision(torch.bfloat16), 1),
}


def train_replicas(rank, stages):
    results = {}
    for name, (more, _, gas) in REPLICAS.items():
        engine, losses = build(stages, t.ds_config(gas, NADAMW, {}, **more))
        replica = engine.grid.get_data_parallel_rank()
        stream = iter(t.data(CALLS * gas, seed=1 + 100 * replica))
        for _ in range(CALLS):
            engine.train_batch(itertools.islice(stream, gas))
        engine.drain()
        results[name] = losses, {of: p.detach().clone() for of, p in engine.module.named_parameters()}
    return results


@functools.cache
def trained_replicas():
    return run_ranks(train_replicas, 4, timeout=280, stages=2)


@pytest.mark.parametrize("name", REPLICAS)
def test_replicas_are_the_simulator(name):
    """A reader's replicas send each its own gradient; the owner's add all up in their one reduction. Bit for bit."""
    _, precision, gas = REPLICAS[name]
    parts = simulator_parts(2)
    reader = f"{len(parts[-1]) - 1}.logits.weight"
    functools.reduce(getattr, reader.split("."), parts[-1]).data.copy_(parts[0][0].token.weight)
    simulator = DelaySimulator(
        parts, next_token_loss, lambda ps: load(NADAMW["type"])(ps, **NADAMW["params"]), Schedule(2, gas),
        precision=precision, replicas=2, shared=[Shared(((0, "0.token.weight"), (1, reader)))],
    )  # fmt: skip
    losses = [[], []]
    for batches in zip(t.data(CALLS * gas), t.data(CALLS * gas, seed=101), strict=True):
        for kept, loss in zip(losses, simulator.train_replicas(batches), strict=True):
            kept.append(loss.item())
    simulator.drain()
    results = [result[name] for result in trained_replicas()]
    assert [results[2][0], results[3][0]] == losses
    owned = simulator.parameters(0)["0.token.weight"]
    for _, weights in results:
        assert [torch.equal(w, owned) for of, w in weights.items() if of.endswith("token.weight")] == [True]


def head_alone(rank, more, grouped):
    """Stages of an embedding, a block, and the embedding as a head: the last one has nothing of its own."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    def head(embedding, hidden):
        return nn.functional.linear(hidden, embedding.weight)

    sizes = GPT["vocabulary"], GPT["width"]
    specs = [
        TiedLayerSpec("embed", nn.Embedding, *sizes),
        LayerSpec(nn.Linear, GPT["width"], GPT["width"]),
        TiedLayerSpec("embed", nn.Embedding, *sizes, forward_fn=head),
    ]
    module = PipelineModule(layers=specs, num_stages=3, loss_fn=next_token_loss, partition_method="uniform")
    learnt = [{"params": [*module.parameters()]}] if grouped else None
    config = t.ds_config(2, NADAMW, {}, **more)
    engine, *_ = deepspeed.initialize(model=module, config=config, model_parameters=learnt)
    stream = iter(t.data(10))
    for _ in range(4):
        engine.train_batch(itertools.islice(stream, 2))
    engine.drain()
    return next(module.parameters()).detach().clone()


@pytest.mark.parametrize("grouped", [False, True])
def test_a_stage_may_have_nothing_but_what_it_reads(grouped):
    owned, _, read = run_ranks(head_alone, 3, more={}, grouped=grouped)
    assert torch.equal(owned, read)


def test_but_deepspeeds_master_weights_need_something_of_its_own():
    results = run_ranks(head_alone, 3, more=BF16, grouped=False, expect_errors=True)
    assert "stage 2 has no parameter of its own to train" in results[2][1]
