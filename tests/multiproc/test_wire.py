"""Coded links: the engine equals the simulator that codes between its stages, bit for bit."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from noflush.order.schedule import Schedule
from noflush.order.wire_format import Wire
from noflush.simulate import DelaySimulator, Precision
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc
GPT = {"vocabulary": 32, "sequence": 12, "width": 16, "heads": 2, "depth": 12}
CALLS = 9


def drain_after_call_3(engine, call):
    if call == 2:
        engine.drain()


def evaluate(engine, call):
    """Evaluation's messages are DeepSpeed's own, and move no noise."""
    if call in (1, 4):
        engine.eval_batch(iter(t.data(2, gpt=GPT, seed=9)), num_micro_batches=2)


def cases():
    """name -> (K, wire, rest of the block, what happens between calls, drains)."""
    found = {}
    for gas in (1, 2):
        for name in ("bf16", "int8", "int4"):
            found[f"{name} K={gas}"] = (gas, name, {}, evaluate, ())
        found[f"drained K={gas}"] = (gas, {"activations": "int8", "gradients": "int4"}, {}, drain_after_call_3, (3,))
        found[f"more in flight K={gas}"] = (gas, "int4", {"extra_in_flight": 3}, drain_after_call_3, (3,))
        found[f"gradients alone, live weights K={gas}"] = (gas, {"gradients": "int8"}, {"weights": "latest"}, None, ())
        found[f"the twin K={gas}"] = (gas, {"activations": "int4"}, {"schedule": "1f1b_flush"}, None, ())
    return found


def train_all(rank, stages):
    results = {}
    for name, (gas, wire, block, between, _) in cases().items():
        config = t.ds_config(gas, block=block | {"wire": wire})
        results[name] = t.train(rank, stages, gas, CALLS, config, gpt=GPT, between=between)
    return results


@functools.cache
def trained(stages):
    return run_ranks(train_all, stages, timeout=280, stages=stages)


@functools.cache
def simulated(stages, name):
    gas, wire, block, _, drains = cases()[name]
    return t.simulate(
        stages, gas, CALLS, t.torch_nadam, block, gpt=GPT, drain_after=drains, wire=Wire.read(wire)
    )  # fmt: skip


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_equals_the_simulator(stages, name):
    t.assert_same([r[name] for r in trained(stages)], *simulated(stages, name))


def test_every_form_gives_numbers_of_its_own():
    losses = [simulated(2, f"{name} K=1")[0][-1] for name in ("bf16", "int8", "int4")]
    plain = t.simulate(2, 1, CALLS, t.torch_nadam, gpt=GPT)[0][-1]
    assert len({plain, *losses}) == 4
    assert max(abs(loss - plain) for loss in losses) < 0.1


def ramp(rank, stages, sizes):
    losses = []

    def loss_fn(outputs, labels):
        loss = t.next_token_loss(outputs, labels)
        losses.append(loss.item())
        return loss

    engine = t.build(stages, t.ds_config(sizes[0][0], block={"wire": "int8"}), loss_fn=loss_fn)
    stream = iter(t.data(sum(k * calls for k, calls in sizes)))
    for gas, calls in sizes:
        engine.set_train_batch_size(3 * gas)
        for _ in range(calls):
            engine.train_batch(data_iter=iter(list(itertools.islice(stream, gas))))
    engine.drain()
    return {"losses": losses, "weights": [p.detach().clone() for p in engine.module.parameters()]}


def test_another_k_in_the_middle():
    """Noise follows batch and micro-batch, which another K numbers anew."""
    stages, sizes = 2, [(1, 4), (2, 4), (1, 3)]
    results = run_ranks(ramp, stages, stages=stages, sizes=sizes)
    parts = t.split_by_blocks(t.layers(), stages)
    simulator = DelaySimulator(parts, t.next_token_loss, t.torch_nadam, Schedule(stages, 1), wire=Wire("int8", "int8"))
    stream = iter(t.data(sum(k * calls for k, calls in sizes)))
    losses = []
    for gas, calls in sizes:
        simulator.change_gas(gas)
        losses += [simulator.train_micro_batch(*batch).item() for batch in itertools.islice(stream, gas * calls)]
    simulator.drain()
    t.assert_same(results, losses, [list(simulator.parameters(s).values()) for s in range(stages)])


BF16 = {"bf16": {"enabled": True}}


def train_replicas(rank):
    configs = {"float32": {}, "bf16": BF16}
    return {
        name: t.train(rank, 2, 2, CALLS, t.ds_config(2, block={"wire": "int8"}, **more), between=drain_after_call_3)
        for name, more in configs.items()
    }


def test_replicas_and_bf16():
    results = run_ranks(train_replicas, 4)
    for name, precision in (("float32", Precision()), ("bf16", Precision(torch.bfloat16))):
        losses, weights = t.simulate(
            2, 2, CALLS, t.torch_nadam, drain_after=(3,), precision=precision, replicas=2, wire=Wire("int8", "int8")
        )
        for replica in range(2):
            t.assert_same([r[name] for r in results][replica::2], losses[replica], weights)
