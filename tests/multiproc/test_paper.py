"""The bench of the paper's setting, rehearsed: two contestants, stopped in the middle, go on and end with a table."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.bench.paper_parts.progress import read

PAPER = Path(__file__).parents[1] / "bench" / "paper.py"
ITERATIONS = 10
NAMES = ["pipedream", "muon-latest"]


def started(out, *more):
    command = [sys.executable, str(PAPER), "--rehearse", "--stages", "2", "--iterations", str(ITERATIONS)]
    command += ["--only", *NAMES, "--out", str(out), *more]
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def ended(process, seconds=400):
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, said


def logs(out, name):
    """Of the last stage, a text a slice."""
    return [path.read_text() for path in sorted((out / name / "logs").glob("*-1.log"))]


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(900)
def test_stopped_in_the_middle_it_goes_on_to_the_end(tmp_path):
    out = tmp_path / "out"
    process = started(out)
    until = time.monotonic() + 400
    # From that line on ranks listen; none has trained yet.
    while time.monotonic() < until and not any("rank 1 of 2" in log for log in logs(out, NAMES[1])):
        time.sleep(0.2)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    assert status == 1, said
    assert "stopped by SIGTERM; the same command goes on" in said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert alive == []

    status, said = ended(started(out))
    assert status == 0, said
    for name in NAMES:
        texts = logs(out, name)
        assert sorted(read(texts).validation) == list(range(1, ITERATIONS + 1))
        # What a slice saved is gone on from: only the first begins anew.
        assert ["resumed from" in text for text in rank_0(out, name)] == [False, *[True] * (len(texts) - 1)]
        assert len(texts) == (1 if name == NAMES[0] else 2)
        assert [path.name for path in (out / name).glob("global_step*")] == [f"global_step{ITERATIONS}"]
    written = (out / "results" / "paper.md").read_text()
    assert "| pipedream | PipeDream: AdamW, stash | 0.0003 | 10 |" in written
    assert "| muon-latest | Muon looking ahead .9, no stash | 0.0015 | 10 |" in written

    status, said = ended(started(out, "--lr", "muon-latest=1e-3"))
    assert status == 2, said
    assert "muon-latest was begun with other settings: --lr is '0.0015' there, and '0.001' here" in said.replace(
        "\n", ""
    )


def rank_0(out, name):
    return [path.read_text() for path in sorted((out / name / "logs").glob("*-0.log"))]
