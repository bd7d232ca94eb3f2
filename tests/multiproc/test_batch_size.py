"""K changes in the middle of a run, as Megatron's ramp-up does: the pipeline drains and goes on, bit for bit."""

from __future__ import annotations

import csv
import dataclasses
import itertools

import pytest
import torch

import tests.multiproc.training as t
from noflush.order.schedule import Schedule
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

# (K, calls): up, up again, and down to where more weight versions are needed than at the start
SIZES = [(2, 4), (4, 3), (1, 6)]


def ramp(rank, stages, optimizer, folder):
    losses = []

    def loss_fn(outputs, labels):
        loss = t.next_token_loss(outputs, labels)
        losses.append(loss.item())
        return loss

    monitor = {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "run"}}
    engine = t.build(stages, t.ds_config(SIZES[0][0], optimizer, block={}, **monitor), loss_fn=loss_fn)
    stream = iter(t.data(sum(k * calls for k, calls in SIZES)))
    samples = []
    for gas, calls in SIZES:
        engine.set_train_batch_size(3 * gas)
        for _ in range(calls):
            engine.train_batch(data_iter=iter(list(itertools.islice(stream, gas))))
        samples.append((engine.global_steps, engine.global_samples, engine.gradient_accumulation_steps()))
    engine.drain()
    with pytest.raises(ValueError, match=r"set_train_batch_size\(4\): it must be a multiple of 3"):
        engine.set_train_batch_size(4)
    return {
        "losses": losses,
        "weights": [p.detach().clone() for p in engine.module.parameters()],
        "samples": samples,
        "updates": engine.updates,
    }


@pytest.mark.parametrize("optimizer", [t.NADAMW, t.ADAMW], ids=["noflush's", "DeepSpeed's"])
def test_another_batch_size_drains_and_goes_on(optimizer, tmp_path):
    from noflush.simulate import DelaySimulator

    torch.set_num_threads(1)
    stages = 4
    results = run_ranks(ramp, stages, stages=stages, optimizer=optimizer, folder=str(tmp_path))
    parts = t.split_by_blocks(t.layers(), stages)
    # Built with room for the most versions; every K is then a schedule of its own.
    make = t.nadamw if optimizer is t.NADAMW else t.adamw
    simulator = DelaySimulator(parts, t.next_token_loss, make, Schedule(stages, 1))
    stream = iter(t.data(sum(k * calls for k, calls in SIZES)))
    losses = []
    for gas, calls in SIZES:
        simulator.drain()
        simulator.schedule = dataclasses.replace(simulator.schedule, gas=gas)
        losses += [simulator.train_micro_batch(*batch).item() for batch in itertools.islice(stream, gas * calls)]
    t.assert_same(results, losses, [list(simulator.parameters(s).values()) for s in range(stages)])
    for result in results:
        assert result["updates"] == 13
        assert result["samples"] == [(4, 24, 2), (7, 60, 4), (13, 78, 1)]
    consumed = list(itertools.accumulate(3 * gas for gas, calls in SIZES for _ in range(calls)))
    for name in ("train_loss", "lr"):
        (path,) = tmp_path.rglob(f"*Samples_{name}.csv")
        assert [int(row[0]) for row in csv.reader(path.open()) if row[0].isdigit()] == consumed, name
