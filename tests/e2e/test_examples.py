"""What a person types: DeepSpeed's launcher, the example scripts, the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from noflush.demo.port import held_port

ROOT = Path(__file__).parents[2]
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner"]

pytestmark = [pytest.mark.e2e, pytest.mark.multiproc]


def run(command, timeout=200):
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout


def launch(*words):
    with held_port() as port:
        return run([*LAUNCHER, "--num_gpus", "2", "--master_port", str(port), *words])


def test_unchanged_script_through_the_launcher():
    status, out = launch("--module", "noflush.run", "examples/plain.py")
    assert status == 0, out[-3000:]
    assert "done: 200 calls, last known loss" in out
    assert "noflush: 1f1b_no_flush, weights stash, update by AdamW through DeepSpeed, lag by stage [1, 0]" in out
    assert "bubble:" in out


def test_the_same_script_without_the_block_is_stock():
    status, out = launch("--module", "noflush.run", "examples/plain.py", "--flush")
    assert status == 0, out[-3000:]
    assert "done: 200 calls" in out
    assert "bubble:" not in out


SLOW = [pytest.param(*one, marks=pytest.mark.slow) for one in ((2, "stash"), (1, "latest"), (2, "2bw"))]


@pytest.mark.parametrize(("gas", "weights"), [(1, "stash"), *SLOW])
def test_plain_torch_without_a_host_is_the_simulator_to_the_bit(gas, weights, tmp_path, monkeypatch):
    for host in ("deepspeed", "megatron", "transformers"):  # in place of those that are installed
        (tmp_path / f"{host}.py").write_text(f"raise ImportError('{host} is blocked')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    blocked, out = run([sys.executable, "-c", "import deepspeed"])
    assert blocked and "deepspeed is blocked" in out  # noqa: PT018
    status, out = run([sys.executable, "examples/bare_torch.py", "--gas", str(gas), "--weights", weights], timeout=100)
    assert status == 0, out[-3000:]
    assert f"P = 3, K = {gas}, {weights}: 12 losses and all weights equal the simulator's to the bit" in out


# The demo goes through DeepSpeed's launcher always.
@pytest.mark.parametrize("launcher", [pytest.param("deepspeed", marks=pytest.mark.slow), "torchrun"])
def test_pretrain_gpt_through_both_launchers(launcher, tmp_path):
    arguments = ["--mock-data", "--vocab-size", "63", "--train-iters", "2", "--lr", "1e-3", "--num-workers", "0"]
    arguments += ["--pipeline-model-parallel-size", "2", "--eval-iters", "0", "--log-interval", "1"]
    arguments = ["launch/pretrain_gpt.py", "@examples/gpt_demo.args", *arguments, "--deepspeed"]
    arguments += ["--deepspeed_config", "examples/ds_config.json"]
    if launcher == "deepspeed":
        status, out = launch(*arguments)
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        status, out = run([*torchrun, *arguments])
    assert status == 0, out[-3000:]
    assert "finished at iteration 2" in out
    assert "lag by stage [1, 0]" in out


def test_wrong_arguments_are_told_once_through_a_launcher():
    status, out = launch("launch/pretrain_gpt.py", "--num-layers", "3", "--pipeline-model-parallel-size", "2")
    assert status != 0
    assert out.count("--num-layers 3 on --pipeline-model-parallel-size 2") == 1
    assert "Traceback" not in out.split("noflush:")[1].split("deepspeed")[0]


def test_plain_example_is_short_and_its_config_is_good():
    from noflush.patches.deepspeed.faults import check_config

    assert 40 <= len((ROOT / "examples" / "plain.py").read_text().splitlines()) <= 60
    assert check_config(json.loads((ROOT / "examples" / "ds_config.json").read_text())) is not None


def test_wrong_config_stops_before_anything_starts(tmp_path):
    config = tmp_path / "ds.json"
    config.write_text('{"async_pipeline": {"schedule": "gpipe"}, "optimizer": {"type": "AdamW"}}')
    status, out = run([sys.executable, "-m", "noflush.run", "examples/plain.py", "--deepspeed_config", str(config)])
    assert status != 0
    assert "async_pipeline.schedule is 'gpipe': input should be '1f1b_no_flush' or '1f1b_flush'" in out
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "no script given; usage: deepspeed"), (["--local_rank=0", "nothing.py"], "nothing.py is not a file")],
)
def test_run_without_a_script(words, message):
    status, out = run([sys.executable, "-m", "noflush.run", *words])
    assert status != 0
    assert message in out


def test_local_rank_goes_behind_the_script():
    from noflush.run import split_arguments

    assert split_arguments(["--local_rank=3", "train.py", "--lr", "1"]) == ("train.py", ["--lr", "1", "--local_rank=3"])


def test_demo_in_small(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"It was the best of times, it was the worst of times. " * 6000)
    command = [sys.executable, "examples/compare.py", "--steps", "30", "--out", str(tmp_path), "--text", str(text)]
    status, out = run(command)
    assert status == 0, out[-3000:]
    assert "318,005 tokens" in out  # its bytes, and an end for each of five documents
    assert "tokens/s" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["no_flush"]["delay"] == [3, 2, 1, 0]
    for run_name in ("adamw", "muon", "no_flush"):
        assert {"tokens_per_s", "bubble", "val_loss"} <= set(summary[run_name])
        assert 0 < summary[run_name]["bubble"] < 1
    bubbles = {name: summary[name]["predicted_core_a_stage"]["bubble"] for name in ("muon", "no_flush")}
    assert bubbles["no_flush"] < bubbles["muon"]
    for picture in ("loss.png", "timeline.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
