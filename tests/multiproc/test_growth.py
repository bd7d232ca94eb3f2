"""Nothing grows with the length of a run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc


def train_long(rank, calls, folder):
    import psutil

    block = {"trace_dir": folder}
    engine = t.build(4, t.ds_config(1, block=block, steps_per_print=100))
    data = itertools.cycle(t.data(16))
    samples = []
    runner = engine.pipeline_stage.runner
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
