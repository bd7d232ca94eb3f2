"""`torchrun --max-restarts`: a run whose rank is killed is started again, and goes on from its newest checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from noflush.demo.port import held_port
from tests.launch.megatron import NADAMW, SMALL

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(400)]
LINE = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+)")


WAYS = {
    "a port": lambda port: ["--master-port", str(port)],
    "a rendezvous": lambda port: ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"],
}


def command(folder, where, more):
    config = folder / "ds_config.json"
    config.write_text(json.dumps({"optimizer": NADAMW, "async_pipeline": {"enabled": True}}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *where]
    script = ["--max-restarts", "2", "launch/pretrain_gpt.py", *SMALL.split(), "--log-interval", "1"]
    script += ["--pipeline-model-parallel-size", "2", "--deepspeed_config", str(config), "--train-iters", "400"]
    return [*torchrun, *script, *more.split()]


def lines(log):
    return [(int(n), loss) for n, loss in LINE.findall(log.read_text())]


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_rank_is_started_again_at_the_newest_checkpoint(way, tmp_path):
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    alone, disturbed = tmp_path / "alone.log", tmp_path / "disturbed.log"
    with held_port() as port, alone.open("w") as log:
        done = subprocess.run(
            command(tmp_path, WAYS[way](port), ""),
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=180,
        )
    assert done.returncode == 0, alone.read_text()[-2000:]
    more = f"--save {tmp_path}/save --load {tmp_path}/save --save-interval 50"
    with held_port() as port, disturbed.open("w") as log:
        process = subprocess.Popen(
            command(tmp_path, WAYS[way](port), more), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 180
        while max(lines(disturbed), default=(0, ""))[0] < 120 and time.monotonic() < deadline:
            time.sleep(0.2)
        ranks = [p for p in psutil.Process(process.pid).children() if "pretrain_gpt.py" in " ".join(p.cmdline())]
        os.kill(ranks[0].pid, signal.SIGKILL)
        try:
            assert process.wait(timeout=180) == 0, disturbed.read_text()[-2000:]
        finally:
            process.terminate()
    found = lines(disturbed)
    assert {n for n, _ in found} == set(range(1, 401))
    assert len(found) > 400  # some were done twice
    expected = dict(lines(alone))
    assert [pair for pair in found if expected[pair[0]] != pair[1]] == []
