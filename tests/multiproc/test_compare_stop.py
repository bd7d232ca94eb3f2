"""A comparison that is told to stop ends with its workers, keeps what has finished, and goes on from it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

ASKED = ["--sequence", "8", "--width", "8", "--heads", "2", "--batch", "2", "--stages", "2", "--no-picture"]


@pytest.mark.parametrize(
    "sign",
    [*(pytest.param(sign, marks=pytest.mark.slow) for sign in (signal.SIGINT, signal.SIGTERM)), signal.SIGKILL],
)
def test_stopped_in_the_middle(sign, tmp_path):
    asked = ["noflush", "compare", *ASKED, "--tokens", "20000", "--out", str(tmp_path)]
    # Of a shell's background jobs SIGINT is ignored, and so it would be here.
    code = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.argv = {asked!r}; runpy.run_module('noflush', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    trials = tmp_path / "trials.jsonl"
    until = time.monotonic() + 120
    while not trials.exists() and time.monotonic() < until:
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(sign)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if sign == signal.SIGKILL else 130), said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert all(json.loads(line)["loss"] > 0 for line in trials.read_text().splitlines())
