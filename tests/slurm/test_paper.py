"""The bench of the paper's setting in a SLURM job: srun starts its ranks, and a warned job goes back into the queue."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not_here

PAPER = Path(__file__).parents[1] / "bench" / "paper.py"
START = 240

_no_reason = why_not_here()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(_no_reason is not None, reason=str(_no_reason)),
    pytest.mark.timeout(900),
]


def test_a_warned_job_saves_goes_back_and_ends_what_it_began(tmp_path):
    out, script = tmp_path / "out", tmp_path / "paper.sh"
    rehearsal = f"--rehearse --stages 2 --iterations 10 --only muon --out {out}"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} {PAPER} {rehearsal}\n")
    logs = out / "muon" / "logs"
    with Cluster(tmp_path / "slurm", nodes=2, life=900) as cluster:
        options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--requeue", "--open-mode=append"]
        job = cluster.sbatch(script, options=options, environment={"DS_ACCELERATOR": "cpu"}, folder=tmp_path)
        first = logs / "0001-0.log"
        cluster.wait_for(lambda: first.exists() and "by slurm" in first.read_text(), START, "the first slice's ranks")
        cluster.run(["scancel", "--batch", "--signal=USR1", str(job)])

        def is_back():
            found = cluster.job(job)
            return (found["Restarts"], found["JobState"]) == ("1", "PENDING")

        cluster.wait_for(is_back, START, "the job back in the queue")
        assert "stopped at iteration" in first.read_text()
        cluster.requeue_now(job)
        state = cluster.wait_for_end(job, START)
        assert state == "COMPLETED", cluster.report()
        assert "stopped by SIGUSR1; the same command goes on" in cluster.output(job)
        assert "| muon | Muon looking ahead .9, stash | 0.0015 | 10 |" in (out / "results" / "paper.md").read_text()
        assert "resumed from" in (logs / "0002-0.log").read_text()
        assert "2 tasks of SLURM job" in cluster.output(job)
