"""What a group of the tests trains, and the same in the simulator."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from noflush.demo.gpt import next_token_loss, split_by_blocks
from noflush.methods import DelayAwareNAdamW
from noflush.order.schedule import Schedule
from noflush.replicas.simulate import GroupsSimulator, SimulatedGroup
from noflush.simulate import DelaySimulator
from tests.multiproc import training as t

RATE = {"type": "DelayAwareNAdamW", "params": {"lr": 3e-3, "betas": [0.99, 0.999], "weight_decay": 0.01}}


def gpt_of(stages):
    return t.GPT | {"depth": 2 * stages}


def block(where, **more):
    return {"replicas": {"lighthouse": where, "average_every": 3, "fraction": 0.3, "timeout_s": 20.0, **more}}


def nadamw(params):
    return DelayAwareNAdamW(params, lr=3e-3, betas=(0.99, 0.999), weight_decay=0.01)


def train_group(
    rank, where, name, seed, stages, calls, optimizer=RATE, gas=1, more=None, extra=None, when=None, slow=0.02,
    leaves=None, begun=None,
):  # fmt: skip
    """One rank of a group, which starts when the file ``when`` is there; makes the file ``leaves`` at its end.

    And ``begun`` after ten calls.
    """
    while when is not None and not Path(when).exists():
        time.sleep(0.02)
    loss_fn, losses = t.recording()
    config = t.ds_config(gas, optimizer, block(where, name=name, **(extra or {})), **(more or {}))
    engine = t.build(stages, config, gpt=gpt_of(stages), loss_fn=loss_fn)
    engine.group.join()
    born = engine.global_steps
    for call in range(calls):
        engine.train_batch(iter(t.data(gas, seed=seed + 1000 * call)))
        time.sleep(slow)
        if begun and call == 10:
            Path(begun).touch()
    engine.drain()
    if leaves:
        Path(leaves).touch()
    averager = engine.group.averager
    return {
        "losses": losses,
        "weights": [p.detach().clone() for p in engine.module.parameters()],
        "exchanges": list(averager.exchanges),
        "born_of": averager.born_of,
        "born": born,
        "of_all": averager.samples_of_all,
        "key": engine.group.key,
    }


def train_replicas(rank, stages, calls, seeds):
    """One rank of data parallelism, a replica for each of ``seeds``: what groups in step are to be."""
    loss_fn, losses = t.recording()
    engine = t.build(stages, t.ds_config(1, RATE, {}), gpt=gpt_of(stages), loss_fn=loss_fn)
    seed = seeds[engine.grid.get_data_parallel_rank()]
    for call in range(calls):
        engine.train_batch(iter(t.data(1, seed=seed + 1000 * call)))
    engine.drain()
    return losses, [p.detach().clone() for p in engine.module.parameters()]


def simulated(results, seeds, stages, make_optimizer, drift="corrected", gas=1, **more):
    groups = []
    for result, seed in zip(results, seeds, strict=True):
        parts = split_by_blocks(t.layers(gpt_of(stages)), stages)
        simulator = DelaySimulator(parts, next_token_loss, make_optimizer, Schedule(stages, gas), **more)
        calls = len(result[-1]["losses"]) // gas
        data = [batch for call in range(calls) for batch in t.data(gas, seed=seed + 1000 * call)]
        exchanges = [rank["exchanges"] for rank in result]
        born_of = [rank["born_of"] for rank in result] if result[0]["born"] else None
        groups.append(SimulatedGroup(result[0]["key"], simulator, data, exchanges, born_of))
    GroupsSimulator(groups, drift).run()
    for group in groups:
        group.simulator.drain()
    return groups


def assert_groups_same(results, groups):
    for result, group in zip(results, groups, strict=True):
        assert result[-1]["losses"] == group.losses
        for stage, rank in enumerate(result):
            for got, want in zip(rank["weights"], group.simulator.parameters(stage).values(), strict=True):
                assert torch.equal(got, want)
