"""``eval_weights: "aligned"``: an evaluation is the simulator's after as many updates as stage 0 has made.

Bit for bit, from the first call on, across a drain, another K and a resumed checkpoint; and training is what it is
without.
"""

from __future__ import annotations

import functools

import pytest
import torch

from noflush.demo.gpt import next_token_loss, split_by_blocks
from noflush.order.schedule import Schedule
from noflush.simulate import DelaySimulator, Precision
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc
CALLS = 9
ALIGNED = {"eval_weights": "aligned"}
ZERO, BF16 = {"zero_optimization": {"stage": 1}}, {"bf16": {"enabled": True}}


def cases(stages):
    """name -> (K, block, DeepSpeed's config, optimizer here and there, precision, what happens after call 4)."""
    ours, theirs = (t.NADAMW, t.torch_nadam), (t.ADAMW, t.adamw)
    found = {f"K={gas}": (gas, {}, {}, ours, Precision(), None) for gas in (1, 2)}
    found["DeepSpeed's optimizer"] = (1, {}, {}, theirs, Precision(), None)
    found["more in flight"] = (2, {"extra_in_flight": 3}, {}, ours, Precision(), None)
    found["ZeRO-1"] = (1, {}, ZERO, ours, Precision(), None)
    found["bf16"] = (1, {}, BF16, ours, Precision(torch.bfloat16), None)
    found["drained"] = (1, {}, {}, ours, Precision(), "drain")
    found["another K"] = (1, {}, {}, ours, Precision(), "K")
    found["the twin"] = (2, {"schedule": "1f1b_flush"}, {}, ours, Precision(), None)
    if stages == 2:
        found["2bw"] = (2, {"weights": "2bw"}, {}, ours, Precision(), None)
    return found


def loss_of(outputs, labels):
    return next_token_loss(outputs.float(), labels)  # bfloat16 would hardly tell one version from another


def train(rank, stages, name):
    gas, block, more, (optimizer, _), _, happens = cases(stages)[name]
    (loss_fn, losses), evaluated = t.recording(loss_of), []
    engine = t.build(stages, t.ds_config(gas, optimizer, block | ALIGNED, **more), loss_fn=loss_fn)
    stream = iter(t.data(100))
    for call in range(CALLS):
        engine.train_batch(stream)
        evaluated.append(engine.eval_batch(iter(t.data(1, seed=9)), num_micro_batches=1).item())
        if call == 4 and happens == "drain":
            engine.drain()
        elif call == 4 and happens:
            engine.set_train_batch_size(3 * 2)
    engine.drain()
    weights = [p.detach().clone() for p in engine.module.parameters()]
    return {"losses": losses, "weights": weights, "evaluated": evaluated}


def train_all(rank, stages):
    return {name: train(rank, stages, name) for name in cases(stages)}


@functools.cache
def trained(stages):
    return run_ranks(train_all, stages, timeout=280, stages=stages)


def simulate(stages, name):
    """(losses, weights, what an evaluation after each call has to say)."""
    gas, block, _, (_, make_optimizer), precision, happens = cases(stages)[name]
    schedule = Schedule(stages, gas, block.get("schedule", "1f1b_no_flush"), block.get("weights", "stash"),
                        block.get("extra_in_flight", 0))  # fmt: skip
    parts = split_by_blocks(t.layers(), stages)
    simulator = DelaySimulator(parts, loss_of, make_optimizer, schedule, precision=precision)
    stream, losses, first = iter(t.data(100)), [], 0
    (batch,) = t.data(1, seed=9)
    by_version, evaluated = [simulator.evaluate(*batch).item()], []
    for call in range(CALLS):
        losses += [simulator.train_micro_batch(*next(stream)).item() for _ in range(simulator.schedule.gas)]
        by_version.append(simulator.evaluate(*batch).item())
        # As many updates as stage 0 has made of this segment's.
        lag = -(-simulator.schedule.lag(0) // simulator.schedule.gas)
        evaluated.append(by_version[max(first, call + 1 - lag)])
        if call == 4 and happens == "drain":
            simulator.drain()
            first = call + 1
        elif call == 4 and happens:
            simulator.change_gas(2)
            first = call + 1
    simulator.drain()
    return losses, [list(simulator.parameters(s).values()) for s in range(stages)], evaluated


@pytest.mark.parametrize(("stages", "name"), [(stages, name) for stages in (2, 4) for name in cases(stages)])
def test_an_evaluation_is_the_simulators_of_stage_0s_version(stages, name):
    losses, weights, evaluated = simulate(stages, name)
    results = [result[name] for result in trained(stages)]
    t.assert_same(results, losses, weights)
    assert len(set(evaluated)) > 4
    for result in results:
        assert result["evaluated"] == evaluated


def saves(rank, folder):
    engine = t.build(4, t.ds_config(1, block=ALIGNED))
    stream = iter(t.data(20))
    for _ in range(5):
        engine.train_batch(stream)
    engine.save_checkpoint(folder)
    return engine.eval_batch(iter(t.data(1, seed=9)), num_micro_batches=1).item()


def resumes(rank, folder):
    engine = t.build(4, t.ds_config(1, block=ALIGNED))
    engine.load_checkpoint(folder)
    return engine.eval_batch(iter(t.data(1, seed=9)), num_micro_batches=1).item()


def test_a_checkpoint_has_the_versions_that_are_kept_for_it(tmp_path):
    assert run_ranks(saves, 4, folder=str(tmp_path)) == run_ranks(resumes, 4, folder=str(tmp_path))
