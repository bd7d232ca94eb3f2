"""Counters, learning rates, monitors, the printed line, and the norm that clips."""

from __future__ import annotations

import csv
import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc


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
    from noflush.watch.trace import read

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


def uneven(rank):
    import time

    def slow(gpt=None):
        made = t.layers(gpt)
        made[-1].register_forward_pre_hook(lambda *_: time.sleep(0.02))
        return made

    engine = t.build(3, t.ds_config(1, block={}), gpt=t.GPT | {"depth": 3}, make_layers=slow)
    with redirect_stdout(io.StringIO()) as said:
        for _ in range(52):
            engine.train_batch(iter(t.data(1)))
    return [line for line in said.getvalue().splitlines() if "compute of a call" in line]


def test_the_slowest_stage_is_named_once():
    first, second, (line,) = run_ranks(uneven, 3)
    assert first == second == []
    assert "; stage 2 sets the pace of all, at " in line
