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
    # The loss of call n stands at the samples of call n, whenever rank 0 came to know it; a drain loses none.
    assert [int(row[0]) for row in rows[1:]] == [3 * n for n in range(1, 10)]
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


WARM_UP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 20}}}


def train_save_and_go_on(rank, folder, stages, gas):
    engine = t.build(stages, t.ds_config(gas, block={}, **WARM_UP))
    it = iter(t.data(gas * 8))
    for call in range(8):
        engine.train_batch(it)
        if call == 3:
            engine.save_checkpoint(folder)
    engine.drain()
    weights = [p.detach().clone() for p in engine.module.parameters()]
    files = {f.name: f.stat().st_size for f in Path(folder).rglob("layer_*.pt")}
    return weights, engine.global_steps, engine.global_samples, engine.updates, files


def resume(rank, folder, stages, gas):
    from noflush.intake import DataExhausted

    engine = t.build(stages, t.ds_config(gas, block={}, **WARM_UP))
    noise = iter(t.data(3 * gas, seed=77))
    for _ in range(3):
        engine.train_batch(noise)  # loading with micro-batches in flight forgets them
    if gas > 1:
        with pytest.raises(DataExhausted):
            engine.train_batch(iter(t.data(gas - 1, seed=78)))  # and those that were kept for a next call
    engine.load_checkpoint(folder)
    assert torch.isnan(engine.agg_train_loss)
    assert engine.loss_step is None
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


@pytest.mark.parametrize(("stages", "gas"), [(2, 1), (2, 2), (4, 2)])
def test_resume_is_a_run_that_drained_there(tmp_path, stages, gas):
    whole = run_ranks(train_save_and_go_on, stages, folder=str(tmp_path), stages=stages, gas=gas)
    resumed = run_ranks(resume, stages, folder=str(tmp_path), stages=stages, gas=gas)
    for (weights, *counts, files), (again, *counts_again, loss_step) in zip(whole, resumed, strict=True):
        assert counts == counts_again == [8, 8 * 3 * gas, 8]
        assert loss_step == 8
        assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
        assert max(files.values()) < 40_000  # a layer's file holds the layer, not the flat storage of the stage
    if (stages, gas) == (2, 1):
        for losses, steps in run_ranks(load_in_stock, 2, folder=str(tmp_path)):
            assert losses[0] == losses[1]
            assert steps == 5


def refuse_set_train_batch_size(rank):
    t.build(1, t.ds_config(1, block={})).set_train_batch_size(6)


def test_changing_the_batch_size_is_refused():
    ((kind, message),) = run_ranks(refuse_set_train_batch_size, 1, expect_errors=True)
    assert kind == "RuntimeError"
    assert "set gradient_accumulation_steps in the config and load it again" in message


def evaluate_mid_flight(rank):
    engine = t.build(4, t.ds_config(1, block={}))
    for tokens, labels in t.data(9):
        engine.train_batch(iter([(tokens, labels)]))
    return engine.eval_batch(iter(t.data(1, seed=5))).item(), engine.updates, len(engine._nf_runner.ring.in_flight)


def test_evaluation_sees_every_stages_newest_weights_and_leaves_micro_batches_in_flight():
    from noflush.schedule import Schedule
    from noflush.simulate import DelaySimulator

    torch.set_num_threads(1)
    results = run_ranks(evaluate_mid_flight, 4)
    assert [updates for _, updates, _ in results] == [6, 7, 8, 9]
    assert [in_flight for _, _, in_flight in results] == [3, 2, 1, 0]
    # The simulator's stages after 6, 7, 8 and 9 updates, put together to one model.
    sim = DelaySimulator(t.split_by_blocks(t.layers(), 4), t.next_token_loss, t.torch_nadam, Schedule(4, 1))
    weights = {}
    for updates, pair in enumerate(t.data(9), 1):
        sim.train_micro_batch(*pair)
        if updates >= 6:
            weights[updates - 6] = {name: p.clone() for name, p in sim.parameters(updates - 6).items()}
    x, labels = t.data(1, seed=5)[0]
    for stage, part in enumerate(t.split_by_blocks(t.layers(), 4)):
        part.load_state_dict(weights[stage])
        x = part(x)
    assert {value for value, _, _ in results} == {t.next_token_loss(x, labels).item()}


class Dropping(nn.Module):
    """Notes in which mode it runs; dropout in a recomputed forward would differ in another mode."""

    modes: list = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        Dropping.modes.append(self.training)
        return self.linear(x)


def drain_in_evaluation_mode(rank):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    module = PipelineModule(
        layers=[Dropping(), Dropping()],
        num_stages=2,
        loss_fn=nn.functional.mse_loss,
        partition_method="uniform",
        activation_checkpoint_interval=1,
        checkpointable_layers=["Dropping"],
    )
    engine, *_ = deepspeed.initialize(model=module, config=t.ds_config(1, block={}))
    sample = (torch.zeros(2, 16), torch.zeros(2, 16))
    for _ in range(3):
        engine.train_batch(iter([sample]))
    engine.eval()
    Dropping.modes.clear()
    engine.drain()
    return list(Dropping.modes), engine.module.training


def test_drain_recomputes_in_training_mode():
    first, last = run_ranks(drain_in_evaluation_mode, 2)
    assert first == ([True], False)
    assert last == ([], False)


# ---- what DeepSpeed resolves out of the config -----------------------------------------------------------


def train_with_inferred_gas(rank):
    config = t.ds_config(4, block={})
    del config["gradient_accumulation_steps"]
    config["train_batch_size"] = 12
    engine = t.build(2, config)
    stream = iter(t.data(20))
    for _ in range(3):
        engine.train_batch(stream)
    return len(list(stream)), engine.updates


def test_update_interval_that_deepspeed_infers():
    """K follows from train_batch_size / (micro-batch size x replicas) where the JSON does not state it."""
    first, last = run_ranks(train_with_inferred_gas, 2)
    assert first == (8, 2)
    assert last == (8, 3)


def train_a_part_of_the_weights(rank, optimizer):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    module = PipelineModule(layers=t.layers(), num_stages=2, loss_fn=t.next_token_loss, partition_method="type:Block")
    left_out = [p for p in module.parameters() if p.dim() == 1]
    before = [p.detach().clone() for p in left_out]
    chosen = [p for p in module.parameters() if p.dim() > 1]
    engine, *_ = deepspeed.initialize(model=module, model_parameters=chosen, config=t.ds_config(1, optimizer, block={}))
    for pair in t.data(6):
        engine.train_batch(iter([pair]))
        assert all(torch.equal(p, q) for p, q in zip(left_out, before, strict=True))
    engine.drain()
    assert all(torch.equal(p, q) for p, q in zip(left_out, before, strict=True))


@pytest.mark.parametrize("optimizer", [t.NADAMW, t.ADAMW], ids=["ours", "torch's"])
def test_weights_no_optimizer_owns_stay_as_they_are(optimizer):
    run_ranks(train_a_part_of_the_weights, 2, optimizer=optimizer)


def initialize_without_a_pipeline(rank, block):
    import deepspeed

    config = t.ds_config(1, t.ADAMW, block)
    engine, *_ = deepspeed.initialize(model=nn.Linear(4, 4), config=config)
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    engine.backward(engine(torch.ones(3, 4)).sum())
    engine.step()
    return type(engine).__name__


def test_enabled_block_without_a_pipeline_module_is_refused_and_not_ignored():
    ((kind, message),) = run_ranks(initialize_without_a_pipeline, 1, expect_errors=True, block={})
    assert kind == "ConfigError"
    assert "the model is a Linear, which DeepSpeedEngine trains: it needs a deepspeed.pipe.PipelineModule" in message
    assert run_ranks(initialize_without_a_pipeline, 1, block={"enabled": False}) == ["DeepSpeedEngine"]
    assert run_ranks(initialize_without_a_pipeline, 1, block=None) == ["DeepSpeedEngine"]


# ---- the way of NCCL: no receive may wait past the end of a call for a message that comes later ----------


def train_without_receives_across_calls(rank, stages, gas):
    from unittest import mock

    with mock.patch("noflush.engine.dist.get_backend", return_value="nccl"):
        engine = t.build(stages, t.ds_config(gas, block={}))
    runner = engine._nf_runner
    history = []

    def state():
        inboxes = runner.neighbours.activations_in, runner.neighbours.gradients_in
        outboxes = runner.neighbours.activations_out, runner.neighbours.gradients_out
        return [i._next if i else 0 for i in inboxes], [o.sent if o else 0 for o in outboxes]

    for call, pair in enumerate(zip(*[iter(t.data(gas * 6))] * gas, strict=True)):
        engine.train_batch(iter(pair))
        history.append(state())
        if call == 3:
            engine.drain()
            history.append(state())
    engine.drain()
    history.append(state())
    return history, [p.detach().clone() for p in engine.module.parameters()]


@pytest.mark.parametrize(("stages", "gas"), [(4, 1), (2, 4)])
def test_between_calls_every_send_has_its_receive_and_the_reverse(stages, gas):
    results = run_ranks(train_without_receives_across_calls, stages, stages=stages, gas=gas)
    for above, below in itertools.pairwise(results):
        for (posted_above, sent_above), (posted_below, sent_below) in zip(above[0], below[0], strict=True):
            assert posted_below[0] == sent_above[0]  # activations
            assert posted_above[1] == sent_below[1]  # gradients
    torch.set_num_threads(1)
    _, weights = t.simulate(stages, gas, 6, t.torch_nadam, drain_after=(4,))
    for (_, got), want in zip(results, weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- data parallel ---------------------------------------------------------------------------------------


def train_two_pipelines(rank):
    engine = t.build(2, t.ds_config(2, block={}))
    replica = engine.grid.get_data_parallel_id()
    it = iter(t.data(16)[replica::2])
    losses = [engine.train_batch(it).item() for _ in range(4)]
    engine.drain()
    return engine.stage_id, losses, [p.detach().clone() for p in engine.module.parameters()]


def one_replica_runs_out(rank):
    from noflush.intake import DataExhausted

    engine = t.build(2, t.ds_config(2, block={}))
    replica = engine.grid.get_data_parallel_id()
    it = iter(t.data(4 if replica == 0 else 7))
    engine.train_batch(it)
    engine.train_batch(it)
    try:
        engine.train_batch(it)
    except DataExhausted as error:
        message = str(error)
    engine.train_batch(iter(t.data(2, seed=3)))
    engine.drain()
    return message, engine.updates


def test_replicas_stop_together():
    for rank, (message, updates) in enumerate(run_ranks(one_replica_runs_out, 4)):
        assert f"after {0 if rank % 2 == 0 else 2} of 2 micro-batches" in message
        assert updates == 3


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
            # The recorder keeps a fixed number of events: the file has its size by the 1,500th step and stays.
            assert last["trace"] < 1.02 * samples[5]["trace"] < 1e6, [s["trace"] for s in samples]
            assert last["rss"] - samples[3]["rss"] < 5e6, [s["rss"] for s in samples]


def test_nothing_grows_in_300_steps(tmp_path):
    check_nothing_grows(300, str(tmp_path), 30e6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_grows_in_2000_steps(tmp_path):
    check_nothing_grows(2000, str(tmp_path), 20e6)
