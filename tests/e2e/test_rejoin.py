"""What a person types when a rank of a group has died, on a machine where others do not end with it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from noflush.demo.port import held_port
from tests.multiproc.groups import lighthouse

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.multiproc]


def start(module, rank, port, folder, words, world=2):
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log = folder / f"{module}-{port}-{rank}.log"
    command = [sys.executable, *(["-m", module] if module else []), *words]
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    return process, log


def until(condition, seconds, logs):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("\n".join(log.read_text()[-3000:] for log in logs))
        time.sleep(0.1)


@pytest.mark.slow
def test_a_rank_that_died_comes_back_by_one_command(tmp_path):
    """The last stage, which reads data: its labels are those of the micro-batches that the first one draws."""
    with lighthouse() as where, held_port() as one, held_port() as other, contextlib.ExitStack() as ending:
        script = ["examples/one_group.py", "--lighthouse", where, "--calls", "400", "--seconds", "0.04"]
        running = {}
        for name, port in (("a", one), ("b", other)):
            for rank in range(2):
                running[name, rank] = start("noflush.run", rank, port, tmp_path, [*script, "--name", name])
        ending.callback(lambda: [process.kill() for process, _ in running.values()])
        logs = [log for _, log in running.values()]
        until(lambda: "groups: 2" in running["a", 0][1].read_text(), 100, logs)
        time.sleep(2)
        running["a", 1][0].send_signal(signal.SIGKILL)
        until(lambda: "that of b stands in" in running["a", 0][1].read_text(), 30, logs)
        running["a", 1] = start("noflush.rejoin", 1, one, tmp_path, [*script, "--name", "a"])
        until(lambda: "stage 1 is back" in running["a", 0][1].read_text(), 100, [*logs, running["a", 1][1]])
        until(lambda: all(process.poll() is not None for process, _ in running.values()), 100, logs)
        for (name, rank), (process, log) in running.items():
            assert process.returncode == 0, f"{name} {rank}: {log.read_text()[-3000:]}"
        found = {name: re.search(r"done: 400 calls, .* losses (\S+)", running[name, 0][1].read_text()) for name in "ab"}
        losses = {name: float(said[1]) for name, said in found.items()}
        assert max(losses.values()) < 0.45  # ln 2 = .69 where labels are another micro-batch's
        assert abs(losses["a"] - losses["b"]) < 0.1


def test_without_the_dead_ranks_environment_it_says_so(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run(
        [sys.executable, "-m", "noflush.rejoin", "examples/one_group.py", "--name", "a"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set" in done.stderr


@pytest.mark.slow
def test_where_no_group_waits_for_it_it_says_so(tmp_path):
    with held_port() as port:
        process, log = start("noflush.rejoin", 1, port, tmp_path, ["examples/one_group.py", "--name", "a"])
        assert process.wait(100) == 1
    assert f"this rank cannot come back to its group, where ranks met, at 127.0.0.1:{port}" in log.read_text()


@pytest.mark.slow
def test_so_it_does_under_megatrons_arguments(tmp_path):
    """A tied GPT of three stages, whose middle one dies; checkpoints and evaluations are the other group's."""
    with lighthouse() as where, held_port() as one, held_port() as other, contextlib.ExitStack() as ending:
        running, scripts = {}, {}
        for name, port in (("a", one), ("b", other)):
            config = json.loads((ROOT / "examples/ds_config.json").read_text())
            config["async_pipeline"]["replicas"] = {
                "lighthouse": where, "average_every": 5, "fraction": 0.2, "timeout_s": 10.0, "reroute": True,
                "name": name,
            }  # fmt: skip
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps(config))
            scripts[name] = [
                "launch/pretrain_gpt.py", "@examples/gpt_demo.args", "--num-layers", "3", "--hidden-size", "32",
                "--pipeline-model-parallel-size", "3", "--mock-data", "--vocab-size", "127",
                "--tokenizer-type", "NullTokenizer", "--data-cache-path", str(tmp_path / "cache"),
                "--train-iters", "400", "--lr", "4e-3", "--eval-iters", "2", "--eval-interval", "100",
                "--save", str(tmp_path / name), "--save-interval", "100",
                "--deepspeed", "--deepspeed_config", str(path),
            ]  # fmt: skip
            for rank in range(3):
                running[name, rank] = start(None, rank, port, tmp_path, scripts[name], world=3)
        ending.callback(lambda: [process.kill() for process, _ in running.values()])
        logs = [log for _, log in running.values()]
        until(lambda: "iteration       60/" in running["a", 2][1].read_text(), 200, logs)
        running["a", 1][0].send_signal(signal.SIGKILL)
        until(lambda: "that of b stands in" in running["a", 0][1].read_text(), 30, logs)
        running["a", 1] = start("noflush.rejoin", 1, one, tmp_path, scripts["a"], world=3)
        until(lambda: "stage 1 is back" in running["a", 0][1].read_text(), 200, [*logs, running["a", 1][1]])
        until(lambda: all(process.poll() is not None for process, _ in running.values()), 300, logs)
        for (name, rank), (process, log) in running.items():
            assert process.returncode == 0, f"{name} {rank}: {log.read_text()[-3000:]}"
    said = {name: running[name, 2][1].read_text() for name in "ab"}
    losses = {name: [float(x) for x in re.findall(r"lm loss: (\S+)", text)] for name, text in said.items()}
    assert all("iteration      400/" in text for text in said.values())
    assert abs(losses["a"][-1] - losses["b"][-1]) < 0.1
    assert "no checkpoint from here on, for a stage of this group's world is lost" in running["a", 0][1].read_text()
    assert sorted(path.name for path in (tmp_path / "b").iterdir() if path.is_dir())[-1].endswith("400")
