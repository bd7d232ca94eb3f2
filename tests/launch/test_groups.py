"""launch/pretrain_gpt.py as groups: tied Megatron GPTs, one order of data, and one that comes later."""

from __future__ import annotations

import json
import time

import pytest

from tests.launch.megatron import NADAMW, SMALL
from tests.launch.processes import Run
from tests.multiproc.groups import lighthouse

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(280)]


def group(folder, where, name, more):
    """Two ranks of a group, with the tied model that is Megatron's default."""
    (folder / name).mkdir()
    config = folder / name / "ds_config.json"
    replicas = {"lighthouse": where, "average_every": 5, "fraction": 0.25, "timeout_s": 20.0, "name": name}
    block = {"enabled": True, "replicas": replicas}
    config.write_text(json.dumps({"optimizer": NADAMW, "async_pipeline": block}))
    words = SMALL.replace("--untie-embeddings-and-output-weights", "--pipeline-model-parallel-size 2").split()
    words += ["--log-interval", "1", "--deepspeed_config", str(config), "--exit-signal-handler", *more.split()]
    return Run(words, 2, folder / name, "log")


def until(condition, runs):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, "\n".join(run.text(rank) for run in runs for rank in range(2))
        assert all(process.is_alive() for run in runs for process in run.processes), runs[-1].text(0)
        time.sleep(0.1)


@pytest.mark.slow
def test_a_group_that_comes_later_goes_on_where_the_first_is(tmp_path):
    with lighthouse() as where:
        first = group(tmp_path, where, "first", "--train-iters 100000")
        until(lambda: len(first.losses()) > 20, [first])
        second = group(tmp_path, where, "second", "--train-iters 100000")
        until(lambda: "groups: 2 (first, second)" in first.text(0) and len(second.losses()) > 20, [first, second])
        for run in (second, first):
            for process in run.processes:
                process.terminate()
        assert [run.wait(60) for run in (second, first)] == [[0, 0], [0, 0]]
    assert "groups: second goes on from a peer's weights, after" in second.text(0)
    begins, firsts = min(second.losses()), first.losses()
    assert 15 < begins <= max(firsts) + 1
    # Weights that have learnt, not those of a model that starts.
    assert float(second.losses()[begins]) < float(firsts[1]) - 0.02
    assert "stopped at iteration" in second.text(0)
