"""A whole run's processes that read data: gone with it, without a word; what they could not read is one line of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.megatron import NADAMW, SMALL
from tests.launch.test_data_faults import write_pair

pytestmark = [pytest.mark.multiproc]

SCRIPT = Path(__file__).parents[2] / "launch" / "pretrain_gpt.py"


def start(folder, documents, more):
    """One rank over ``documents``, two processes reading ahead for it; not forked, so that Python ends as it does."""
    prefix = write_pair(folder / "d", documents)
    config = folder / "ds_config.json"
    config.write_text(json.dumps({"optimizer": NADAMW, "async_pipeline": {"enabled": True}}))
    small = SMALL.replace("--mock-data", "").replace("--num-workers 0", "--num-workers 2")
    argv = f"{small} --data-path {prefix} --data-cache-path {folder}/cache --tokenizer-type NullTokenizer {more}"
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), *argv.split(), "--deepspeed_config", str(config), "--log-interval", "1"],
        env=environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("stopped", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_clean_end_is_silent(stopped, tmp_path):
    length = "--train-iters 5000000 --exit-signal-handler" if stopped else "--train-iters 4"
    more = f"{length} --split 8,1,1 --eval-interval 2 --eval-iters 2 --lr-decay-iters 4 --lr-warmup-iters 0"
    with start(tmp_path, [[7] * 90] * 100, more) as run:
        try:
            if stopped:
                assert run.stdout is not None
                assert any("validation loss" in line for line in run.stdout)
                run.send_signal(signal.SIGTERM)
            said, errors = run.communicate(timeout=150)
        finally:
            run.kill()
    assert run.returncode == 0, errors
    assert ("stopped at iteration" if stopped else "finished at iteration 4") in said
    assert "Exception ignored" not in errors, errors
    assert "Traceback" not in errors, errors


def test_an_id_outside_the_vocabulary_ends_the_run_with_one_line(tmp_path):
    # Behind the documents that are looked at before a run starts.
    documents = [[5, 6, 7]] * 6000
    documents[5000] = [5, 70_000, 7]
    with start(tmp_path, documents, "--split 1,0,0 --train-iters 600") as run:
        try:
            said, errors = run.communicate(timeout=150)
        finally:
            run.kill()
    assert run.returncode == 2, errors
    assert "iteration        1/" in said, "it was in the middle of the run"
    assert f"noflush: data path {tmp_path}/d: document 5000 has token id 70000 at position 1, outside the" in errors
    assert errors.count("70000") == 1
    assert "Traceback" not in errors, errors
    assert "Exception ignored" not in errors, errors
