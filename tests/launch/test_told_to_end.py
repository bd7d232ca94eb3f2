"""A signal that comes while a run still imports: it saves after its first iteration, says so, and can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from noflush.stage.checkpoint import newest_complete
from tests.launch.megatron import SMALL
from tests.launch.processes import Run

pytestmark = [pytest.mark.multiproc]

SCRIPT = Path(__file__).parents[2] / "launch" / "pretrain_gpt.py"


def test_told_while_it_imports(tmp_path):
    save = tmp_path / "save"
    argv = [*SMALL.split(), "--log-interval", "1", "--save", str(save), "--load", str(save), "--exit-signal-handler"]
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), *argv],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first.startswith("rank 0 of 1"), first + process.stdout.read()
            process.send_signal(signal.SIGUSR1)
            text, _ = process.communicate(timeout=150)
        finally:
            process.kill()
    assert process.returncode == 0, text
    assert "stopped at iteration 1: SIGUSR1" in text
    assert (save / "stopped").read_text() == "iteration 1 of 50, SIGUSR1\n"
    assert newest_complete(save) == "global_step1"

    again = Run(argv, 1, tmp_path, "again")
    assert again.wait(120) == [0], again.text(0)
    assert list(again.losses()) == list(range(2, 51))
    assert not (save / "stopped").exists()
