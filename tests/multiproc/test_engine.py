"""What a DeepSpeed user expects of the engine beyond its numbers; and what happens when things go wrong."""

from __future__ import annotations

import csv
import io
import itertools
import os
import signal
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc


# ---- data ------------------------------------------------------------------------------------------------


def train_to_the_end_of_data(rank):
    from noflush.intake import DataExhausted

    engine = t.build(2, t.ds_config(4, block={}))
    stream = t.data(4 * 3 + 2)
    it = iter(stream)
    seen = []
    for _ in range(3):
        engine.train_batch(it)
    try:
        engine.train_batch(it)
    except StopIteration as error:
        seen.append((type(error) is DataExhausted, str(error)))
    after_error = engine.global_steps
    # Nothing is lost: the two micro-batches that were pulled come first in the next call.
    engine.train_batch(iter(t.data(2, seed=4)))
    engine.drain()
    return seen, after_error, engine.global_steps, [p.detach().clone() for p in engine.module.parameters()]


def train_the_same_data_in_one_go(rank):
    engine = t.build(2, t.ds_config(4, block={}))
    it = iter(t.data(14) + t.data(2, seed=4))
    for _ in range(4):
        engine.train_batch(it)
    engine.drain()
    return [p.detach().clone() for p in engine.module.parameters()]


def test_data_that_ends_in_a_call_loses_nothing():
    ended = run_ranks(train_to_the_end_of_data, 2)
    whole = run_ranks(train_the_same_data_in_one_go, 2)
    for (seen, after_error, steps, weights), expected in zip(ended, whole, strict=True):
        assert seen[0][0]
        assert "ended in call 3 after 2 of 4 micro-batches" in seen[0][1]
        assert (after_error, steps) == (3, 4)
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def train_with_different_data_on_the_last_stage(rank):
    engine = t.build(2, t.ds_config(2, block={"peer_timeout_s": 20}))
    it = iter(t.data(8 if rank == 0 else 3))
    for _ in range(3):
        engine.train_batch(it)


def test_stages_that_disagree_about_data():
    first, last = run_ranks(train_with_different_data_on_the_last_stage, 2, expect_errors=True)
    assert last[0] == "PeerError"
    assert "last stage's data iterator ended after 1 micro-batches, the first stage's gave 2" in last[1]
    assert first[0] == "PeerError"


def train_with_a_short_last_batch(rank):
    engine = t.build(2, t.ds_config(1, block={"peer_timeout_s": 20}))
    engine.train_batch(iter(t.data(1)))
    engine.train_batch(iter(t.data(1, batch=2)))


def test_shape_that_changes():
    first, last = run_ranks(train_with_a_short_last_batch, 2, expect_errors=True)
    assert first[0] == "ValueError"
    assert "every micro-batch must have one shape; drop the last partial batch" in first[1]
    assert last[0] == "PeerError"


# ---- what passes between stages --------------------------------------------------------------------------


class TupleIn(nn.Module):
    """tokens -> (activation, mask that is passed along, int positions, a float that needs no gradient)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 8)

    def forward(self, tokens):
        mask = tokens > 5
        return self.embed(tokens), mask, torch.arange(tokens.shape[1]), torch.full((2, 3), 0.5)


class TupleMiddle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, payload):
        x, mask, positions, half = payload
        # A second differentiable tensor from here on; the unused one below gets a zero gradient.
        return self.a(x) * mask.unsqueeze(-1) * half[0, 0], self.b(x) + positions.unsqueeze(-1), mask, x * 1.0


class TupleOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(12, 32)

    def forward(self, payload):
        x, y, mask, _ = payload
        return self.out(torch.cat([x, y], dim=-1)) * mask.unsqueeze(-1)


def tuple_layers():
    torch.manual_seed(11)
    return [TupleIn(), TupleMiddle(), TupleOut()]


def train_tuples(rank):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    module = PipelineModule(layers=tuple_layers(), num_stages=3, loss_fn=t.next_token_loss, partition_method="uniform")
    engine, *_ = deepspeed.initialize(model=module, config=t.ds_config(2, block={}))
    it = iter(t.data(12))
    for _ in range(6):
        engine.train_batch(it)
    engine.drain()
    return [p.detach().clone() for p in engine.module.parameters()]


def test_any_tensors_pass_between_stages():
    from noflush.schedule import Schedule
    from noflush.simulate import DelaySimulator

    torch.set_num_threads(1)
    results = run_ranks(train_tuples, 3)
    sim = DelaySimulator(tuple_layers(), t.next_token_loss, t.torch_nadam, Schedule(3, 2))
    for tokens, labels in t.data(12):
        sim.train_micro_batch(tokens, labels)
    for s in range(3):
        for got, want in zip(results[s], sim.parameters(s).values(), strict=True):
            assert torch.equal(got, want)


# ---- counters, schedules, reports ------------------------------------------------------------------------


def train_with_reports(rank, folder):
    monitors = {
        "csv_monitor": {"enabled": True, "output_path": f"{folder}/csv", "job_name": "run"},
        "tensorboard": {"enabled": True, "output_path": f"{folder}/tb", "job_name": "run"},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 8}},
        "steps_per_print": 3,
        "wall_clock_breakdown": True,
    }
    engine = t.build(4, t.ds_config(1, block={"trace_dir": f"{folder}/trace"}, **monitors))
    out, rates, counts = io.StringIO(), [], []
    with redirect_stdout(out):
        for call in range(9):
            loss = engine.train_batch(iter(t.data(1, seed=call)))
            rates.append(engine.get_lr()[0])
            counts.append((engine.global_steps, engine.global_samples, engine.updates, engine.loss_step))
            assert engine.was_step_applied() == (engine.updates == call + 1 - engine.lag and engine.updates > 0)
    engine.drain()
    return out.getvalue(), rates, counts, loss.item(), engine.get_global_grad_norm()


def test_counters_rates_monitors_and_the_printed_line(tmp_path):
    results = run_ranks(train_with_reports, 4, folder=str(tmp_path))
    for stage, (_, rates, counts, _, _) in enumerate(results):
        lag = 3 - stage
        for call, (steps, samples, updates, loss_step) in enumerate(counts, 1):
            assert (steps, samples) == (call, 3 * call)
            assert updates == max(0, call - lag)
            assert loss_step == (call - lag if call > lag else None)
        # The rate follows the stage's own updates: the same sequence, `lag` calls later.
        assert rates[lag:] == results[3][1][: 9 - lag]
    text = results[0][0]
    assert "steps: 3 loss: not known yet" in text
    assert "steps: 9 loss: 3." in text
    assert "(of step 6)" in text
    assert "bubble: " in text
    assert "wait for gradient" in text  # wall_clock_breakdown
    files = list(Path(tmp_path).rglob("*.csv"))
    losses = next(f for f in files if "train_loss" in f.name)
    rows = list(csv.reader(losses.open()))
    # The loss of call n stands at the samples of call n, whenever rank 0 came to know it.
    assert [int(row[0]) for row in rows[1:]] == [3 * n for n in range(1, 7)]
    assert any("bubble" in f.name for f in files)
    assert list(Path(tmp_path).rglob("events.out.tfevents*"))
    from noflush.trace import read

    assert {e.stage for e in read(tmp_path / "trace").events} == {0, 1, 2, 3}


def train_clipped(rank):
    engine = t.build(2, t.ds_config(2, block={}, gradient_clipping=0.01))
    norms = []
    it = iter(t.data(12))
    for _ in range(6):
        engine.train_batch(it)
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
    return norms


def test_clip_norm_is_the_stages_own_and_right():
    """Against a single process: the norm of all of a stage's gradients, not DeepSpeed's count of some of them."""
    torch.set_num_threads(1)
    norms = run_ranks(train_clipped, 2)
    tokens_and_labels = t.data(2)
    parts = t.split_by_blocks(t.layers(), 2)
    for tokens, labels in tokens_and_labels:
        (t.next_token_loss(parts[1](parts[0](tokens)), labels) / 2).backward()
    for stage, part in enumerate(parts):
        norm = torch.cat([p.grad.flatten() for p in part.parameters()]).norm().item()
        first = next(value for value in norms[stage] if value is not None)
        assert first == pytest.approx(norm, rel=1e-5)


# ---- evaluation and checkpoints --------------------------------------------------------------------------


def train_save_and_go_on(rank, folder, gas):
    engine = t.build(2, t.ds_config(gas, block={}))
    it = iter(t.data(gas * 8))
    for call in range(8):
        engine.train_batch(it)
        if call == 3:
            engine.save_checkpoint(folder)
    engine.drain()
    weights = [p.detach().clone() for p in engine.module.parameters()]
    files = {f.name: f.stat().st_size for f in Path(folder).rglob("layer_*.pt")}
    return weights, engine.global_steps, engine.global_samples, engine.updates, files


def resume(rank, folder, gas):
    engine = t.build(2, t.ds_config(gas, block={}))
    noise = iter(t.data(3 * gas, seed=77))
    for _ in range(3):
        engine.train_batch(noise)  # loading with micro-batches in flight forgets them
    engine.load_checkpoint(folder)
    it = itertools.islice(iter(t.data(gas * 8)), gas * 4, None)
    for _ in range(4):
        engine.train_batch(it)
    engine.drain()
    weights = [p.detach().clone() for p in engine.module.parameters()]
    return weights, engine.global_steps, engine.global_samples, engine.updates, engine.loss_step


def load_in_stock(rank, folder):
    import deepspeed

    nadam = {
        "type": "NAdam",
        "params": {"lr": 3e-3, "betas": [0.99, 0.999], "weight_decay": 0.01, "decoupled_weight_decay": True},
    }
    stock = t.build(2, t.ds_config(1, nadam))
    assert type(stock).__name__ == "PipelineEngine"
    assert isinstance(stock, deepspeed.PipelineEngine)
    stock.load_checkpoint(folder)
    ours = t.build(2, t.ds_config(1, block={}))
    assert isinstance(ours, deepspeed.PipelineEngine)
    assert issubclass(type(ours), deepspeed.PipelineEngine)
    ours.load_checkpoint(folder)
    losses = [e.eval_batch(iter(t.data(4, seed=5)), num_micro_batches=4).item() for e in (stock, ours)]
    stock.train_batch(iter(t.data(1)))
    return losses, stock.global_steps


@pytest.mark.parametrize("gas", [1, 2])
def test_resume_is_a_run_that_drained_there(tmp_path, gas):
    whole = run_ranks(train_save_and_go_on, 2, folder=str(tmp_path), gas=gas)
    resumed = run_ranks(resume, 2, folder=str(tmp_path), gas=gas)
    for (weights, *counts, files), (again, *counts_again, loss_step) in zip(whole, resumed, strict=True):
        assert counts == counts_again == [8, 8 * 3 * gas, 8]
        assert loss_step == 8
        assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
        assert max(files.values()) < 40_000  # a layer's file holds the layer, not the flat storage of the stage
    if gas == 1:
        for losses, steps in run_ranks(load_in_stock, 2, folder=str(tmp_path)):
            assert losses[0] == losses[1]
            assert steps == 5


def refuse_set_train_batch_size(rank):
    t.build(1, t.ds_config(1, block={})).set_train_batch_size(6)


def test_changing_the_batch_size_is_refused():
    ((kind, message),) = run_ranks(refuse_set_train_batch_size, 1, expect_errors=True)
    assert kind == "RuntimeError"
    assert "set gradient_accumulation_steps in the config and load it again" in message


# ---- data parallel ---------------------------------------------------------------------------------------


def train_two_pipelines(rank):
    engine = t.build(2, t.ds_config(2, block={}))
    replica = engine.grid.get_data_parallel_id()
    it = iter(t.data(16)[replica::2])
    losses = [engine.train_batch(it).item() for _ in range(4)]
    engine.drain()
    return engine.stage_id, losses, [p.detach().clone() for p in engine.module.parameters()]


def test_two_replicas_of_two_stages():
    """Equal on both replicas; equal to one pipeline that saw both halves, within the reduction's rounding."""
    from noflush.schedule import Schedule
    from noflush.simulate import DelaySimulator

    torch.set_num_threads(1)
    results = run_ranks(train_two_pipelines, 4)
    # One micro-batch of both replicas' samples has the mean of their gradients.
    sim = DelaySimulator(t.split_by_blocks(t.layers(), 2), t.next_token_loss, t.torch_nadam, Schedule(2, 2))
    pairs = t.data(16)
    for a, b in zip(pairs[::2], pairs[1::2], strict=True):
        sim.train_micro_batch(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
    for stage in range(2):
        replicas = [weights for s, _, weights in results if s == stage]
        for a, b, want in zip(*replicas, sim.parameters(stage).values(), strict=True):
            assert torch.equal(a, b)
            assert torch.allclose(a, want, atol=2e-5)
    assert results[0][1][1:] == results[1][1][1:]


# ---- peers that die --------------------------------------------------------------------------------------


def die_in_the_middle(rank, victim):
    engine = t.build(4, t.ds_config(1, block={"peer_timeout_s": 15}))
    for call in range(50):
        if rank == victim and call == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        engine.train_batch(iter(t.data(1, seed=call)))


@pytest.mark.parametrize("victim", [0, 2, 3])
def test_a_dead_peer_ends_the_job_and_is_named(victim):
    start = time.monotonic()
    results = run_ranks(die_in_the_middle, 4, timeout=100, expect_errors=True, victim=victim)
    assert time.monotonic() - start < 80
    for rank, result in enumerate(results):
        if rank != victim:
            assert result[0] == "PeerError"
            assert f"stage {rank}" in result[1]
    neighbour = results[victim + 1 if victim < 3 else 2]
    assert f"stage {victim} (rank {victim})" in neighbour[1]


def hang_in_the_middle(rank):
    engine = t.build(2, t.ds_config(1, block={"peer_timeout_s": 5}))
    for call in range(50):
        if rank == 1 and call == 4:
            time.sleep(20)
        engine.train_batch(iter(t.data(1, seed=call)))


def test_a_stuck_peer_ends_the_wait():
    first, _ = run_ranks(hang_in_the_middle, 2, timeout=100, expect_errors=True)
    assert first[0] == "PeerError"
    assert "stage 0 gave up waiting for gradient" in first[1]
    assert "sent nothing for 5 s" in first[1]


# ---- weights that were not swapped -----------------------------------------------------------------------


def forget_the_swap(rank):
    engine = t.build(2, t.ds_config(1, block={"peer_timeout_s": 20}))
    if rank == 0:
        engine._nf_runner.ring.bind_for_backward = lambda micro_batch: None
    for call in range(5):
        engine.train_batch(iter(t.data(1, seed=call)))


def test_a_missed_swap_fires_the_assert_in_the_engine():
    first, _ = run_ranks(forget_the_swap, 2, expect_errors=True)
    assert first[0] == "WeightVersionError"
    assert "backward of micro-batch 1 needs weight version 0" in first[1]


# ---- nothing grows ---------------------------------------------------------------------------------------


def train_long(rank, calls, folder):
    import psutil

    block = {"trace_dir": folder}
    engine = t.build(4, t.ds_config(1, block=block, steps_per_print=100))
    data = itertools.cycle(t.data(16))
    samples = []
    runner = engine._nf_runner
    for call in range(calls):
        engine.train_batch(data)
        if call % (calls // 8) == calls // 8 - 1:
            inboxes = [c for c in (runner.neighbours.activations_in, runner.neighbours.gradients_in) if c]
            samples.append(
                {
                    "rss": psutil.Process().memory_info().rss,
                    "open sends": runner.neighbours.open_sends,
                    "posted": sum(c.posted for c in inboxes),
                    "buffers": engine.num_pipe_buffers,
                    "outputs": len(engine.fwd_outputs),
                    "tags": len(runner.ring.in_flight),
                    "trace": sum(f.stat().st_size for f in Path(folder).glob(f"rank{rank}.json")),
                }
            )
    return samples


def check_nothing_grows(calls, folder, rss_bytes):
    for samples in run_ranks(train_long, 4, timeout=500, calls=calls, folder=folder):
        first, last = samples[2], samples[-1]
        for key in ("open sends", "posted", "buffers", "outputs", "tags"):
            assert last[key] <= first[key] <= 40, (key, samples)
        assert last["rss"] - first["rss"] < rss_bytes, samples
        if calls >= 2000:
            # The recorder keeps a fixed number of events; the file reaches its size and stays.
            assert last["trace"] < 1.2 * samples[-2]["trace"] < 3e6, samples


def test_nothing_grows_in_300_steps(tmp_path):
    check_nothing_grows(300, str(tmp_path), 30e6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_grows_in_2000_steps(tmp_path):
    check_nothing_grows(2000, str(tmp_path), 20e6)
