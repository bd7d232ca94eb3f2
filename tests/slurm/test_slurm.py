"""launch/slurm/pretrain_gpt.sbatch on a real SLURM of five nodes: a dead node, a dead rank, the time limit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster, ClusterError, why_not_here

ROOT = Path(__file__).parents[2]
BATCH = ROOT / "launch" / "slurm" / "pretrain_gpt.sbatch"
SCRIPT = ROOT / "launch" / "pretrain_gpt.py"
STAGES = 4
ITERATIONS = 30
SAVE_INTERVAL = 5
# An iteration takes long enough (some 0.3 s) for a node to be killed between two of them.
MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 "
    "--attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 63 --num-workers 0 "
    "--micro-batch-size 24 --global-batch-size 24 --lr 1e-3 --lr-decay-iters 1000 --log-interval 1 --eval-iters 0"
)
CONFIG = {
    "optimizer": {"type": "DelayAwareNAdamW", "params": {"betas": [0.99, 0.999]}},
    "async_pipeline": {"enabled": True},
}
# Seconds, to end what hangs. A start is ten seconds of imports a rank, on cores that others want too.
START = 240
REQUEUE = 120

_no_reason = why_not_here()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(_no_reason is not None, reason=str(_no_reason)),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One node more than stages."""
    with Cluster(tmp_path_factory.mktemp("cluster") / "slurm", nodes=STAGES + 1, life=3600) as cluster:
        yield cluster


LINE = re.compile(r"^ \[.+\] iteration +(\d+)/.* \| lm loss: (\d\.\d{6}E[+-]\d\d) \|", re.MULTILINE)


class Job:
    """A training job in a folder of its own."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *options: str,
        stages: int = STAGES,
        iterations: int = ITERATIONS,
        **environ: str,
    ):
        self.cluster = cluster
        self.stages = stages
        self.folder = folder
        self.save = folder / "checkpoints"
        self.lasts(iterations)
        mine = {"SAVE": str(self.save), "SCRIPT": str(SCRIPT), "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
        self.number = cluster.sbatch(
            BATCH,
            f"@{folder}/gpt.args",
            options=[f"--nodes={stages}", "--ntasks-per-node=1", "--cpus-per-task=1", *options],
            environment=mine | environ,
            folder=folder,
        )

    def lasts(self, iterations: int) -> None:
        """How far the job's next start goes."""
        (self.folder / "ds_config.json").write_text(json.dumps(CONFIG))
        lines = [
            f"{MODEL}  # written by the test",
            f"--pipeline-model-parallel-size {self.stages} --deepspeed_config {self.folder}/ds_config.json",
            f"--train-iters {iterations} --save-interval {SAVE_INTERVAL}",
        ]
        (self.folder / "gpt.args").write_text("\n".join(lines))

    def log(self, restart: int, rank: int | None = None) -> str:
        """A rank's log since the job's ``restart``-th start; by default the last's, which logs losses."""
        rank = self.stages - 1 if rank is None else rank
        path = self.save / "logs" / f"noflush-{self.number}-{restart}-{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def losses(self, restart: int) -> dict[int, str]:
        """Iteration -> loss as printed."""
        return {int(i): loss for i, loss in re.findall(LINE, self.log(restart))}

    def saved(self) -> int:
        """The newest complete checkpoint's iteration."""
        latest = self.save / "latest"
        return int(re.sub(r"\D", "", latest.read_text())) if latest.exists() else 0

    def trains_behind(self, checkpoint: int, restart: int) -> None:
        """Waits until that start of the job has made iterations which the newest checkpoint does not have."""
        self.wait(
            lambda: self.saved() >= checkpoint and max(self.losses(restart), default=0) > checkpoint + 1,
            START,
            f"iterations behind checkpoint {checkpoint}",
        )

    def is_back(self, restarts: int) -> bool:
        """Whether SLURM has put the job back so often, and it has let go of its nodes."""
        found = self.cluster.job(self.number)
        return found["Restarts"] == str(restarts) and found["JobState"] == "PENDING"

    def wait(self, predicate, timeout: float, what: str) -> float:
        """As the cluster's, but a job that has ended on the way is an error at once."""

        def holds():
            if predicate():
                return True
            if self.cluster.state(self.number) in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED"):
                raise ClusterError(f"job {self.number} ended; waited for: {what}\n{self.cluster.report()}")
            return False

        return self.cluster.wait_for(holds, timeout, what)

    def finishes(self, timeout: float = START) -> None:
        state = self.cluster.wait_for_end(self.number, timeout)
        if state != "COMPLETED":
            raise ClusterError(f"job {self.number} is {state}\n{self.cluster.report()}")


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    job = Job(cluster, tmp_path_factory.mktemp("undisturbed"))
    job.finishes()
    return job


def test_a_task_a_node(cluster, undisturbed):
    assert list(undisturbed.losses(0)) == list(range(1, ITERATIONS + 1))
    assert len(set(undisturbed.losses(0).values())) == ITERATIONS
    assert undisturbed.saved() == ITERATIONS
    assert f"finished at iteration {ITERATIONS}" in undisturbed.log(0, 0)
    assert "finished, checkpoint" in cluster.output(undisturbed.number)
    port = 10000 + undisturbed.number
    for rank in range(STAGES):
        assert f"rank {rank} of {STAGES}, device 0, by slurm, meeting at node1:{port}" in undisturbed.log(0, rank)
    assert cluster.job(undisturbed.number)["Restarts"] == "0"


def test_a_dead_rank_and_a_dead_node(cluster, undisturbed, tmp_path):
    """One job, restarted for each: from the newest checkpoint, with the losses of a run that was left alone."""
    job, expected = Job(cluster, tmp_path), undisturbed.losses(0)
    job.trains_behind(10, restart=0)
    # The rank's peers see a connection end, and fail: the batch script puts the job back, for it has come further.
    for process in cluster.tasks("node2", SCRIPT.name):
        process.kill()
    job.wait(lambda: job.is_back(1), REQUEUE, "the job back in the queue for its rank")
    assert "came from checkpoint none to" in cluster.output(job.number)
    saved = [0, job.saved()]

    cluster.requeue_now(job.number)
    job.trains_behind(20, restart=1)
    # No connection ends: the peers wait, SLURM misses the node and puts the job elsewhere.
    cluster.kill_node("node3")
    job.wait(lambda: job.is_back(2), REQUEUE, "the job back in the queue for its node")
    saved.append(job.saved())

    cluster.requeue_now(job.number)
    job.finishes()
    assert "node3" not in cluster.job(job.number)["NodeList"]
    cluster.bring_back("node3")
    runs = [job.losses(restart) for restart in range(3)]
    assert [min(run) for run in runs] == [iteration + 1 for iteration in saved]
    assert max(runs[0]) < ITERATIONS
    assert max(runs[1]) < ITERATIONS
    assert runs == [{i: expected[i] for i in run} for run in runs]
    assert list(runs[2]) == list(range(saved[2] + 1, ITERATIONS + 1))


def test_the_time_limit(cluster, tmp_path):
    """The batch script's own warning, two minutes ahead: the run saves, ends, and goes on when it is started again."""
    job = Job(cluster, tmp_path, "--time=60", stages=2, iterations=10_000)
    job.trains_behind(0, restart=0)
    # Limits are whole minutes. SLURM looks every half minute whether to warn, and warns half a minute early.
    hours, minutes, seconds = map(int, cluster.job(job.number)["RunTime"].split(":"))
    limit = (3600 * hours + 60 * minutes + seconds + 90) // 60 + 1
    cluster.run(["scontrol", "update", f"jobid={job.number}", f"TimeLimit={limit}"])
    job.wait(lambda: job.is_back(1), 180, "the job back in the queue")
    saved = job.saved()
    assert max(job.losses(0)) == saved > 0
    assert f"told to end (iteration {saved} of 10000, SIGUSR1)" in cluster.output(job.number)
    # No second warning while this machine is busy.
    cluster.run(["scontrol", "update", f"jobid={job.number}", "TimeLimit=60"])
    job.lasts(saved + 5)  # --lr-decay-iters stays
    cluster.requeue_now(job.number)
    job.finishes()
    assert f"resumed from {job.save} at iteration {saved}" in job.log(1, 0)
    assert list(job.losses(1)) == list(range(saved + 1, saved + 6))
    assert not (job.save / "stopped").exists()


def test_a_run_that_fails_at_once_is_not_tried_again(cluster, tmp_path):
    job = Job(cluster, tmp_path, RANK="0")
    assert cluster.wait_for_end(job.number, 120) == "FAILED"
    assert "no further than checkpoint none: not tried again" in cluster.output(job.number)
    assert "but WORLD_SIZE and LOCAL_RANK not: a launcher sets all of" in job.log(0, 0)


def test_a_task_a_gpu(cluster, tmp_path):
    job = Job(cluster, tmp_path, "--gpus-per-node=2")
    assert cluster.wait_for_end(job.number, 120) == "FAILED"
    assert "one task a GPU: 2 GPUs a node need --ntasks-per-node=2, which is 1" in cluster.output(job.number)
    see = tmp_path / "see.py"
    see.write_text("import os; print(os.environ['SLURM_LOCALID'], os.environ['CUDA_VISIBLE_DEVICES'])")
    job = Job(cluster, tmp_path, "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", SCRIPT=str(see))
    job.finishes()
    assert [job.log(0, rank) for rank in range(4)] == ["0 0,1\n", "1 0,1\n"] * 2


def test_dry_run_in_a_job(cluster, tmp_path):
    """The job's own number of tasks is checked."""
    job = Job(cluster, tmp_path, DRY_RUN="1")
    job.finishes()
    plan = cluster.output(job.number)
    assert f"{STAGES} ranks: pipeline {STAGES} x data 1 x tensor 1" in plan
    assert "dry run: nothing was started" in plan
    assert not job.save.exists()
    job = Job(cluster, tmp_path, "--nodes=3", DRY_RUN="1")
    assert cluster.wait_for_end(job.number, 120) == "FAILED"
    assert f"3 ranks for --tensor-model-parallel-size 1 x --pipeline-model-parallel-size {STAGES}" in cluster.output(
        job.number
    )


def test_dry_run_without_slurm(tmp_path):
    """The command of docs/slurm.md, in a checkout: as many ranks as the arguments need."""
    words = ["bash", str(BATCH), "@launch/configs/gpt-125m.args", "--mock-data", "--vocab-size", "50256"]
    environ = {"DRY_RUN": "1", "SAVE": str(tmp_path / "save"), "PYTHON": sys.executable, "PATH": os.environ["PATH"]}
    environ["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(words, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "GPT of 163,109,376 parameters" in done.stdout, done
    assert "4 ranks: pipeline 4 x data 1 x tensor 1" in done.stdout, done
    assert "predicted utilisation: 100.0% without the flush, 72.7% with it" in done.stdout, done
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_cluster(tmp_path):
    """Its daemons, its nodes, and a job's processes end with it."""
    with Cluster(tmp_path / "slurm", nodes=1) as cluster:
        script = tmp_path / "sleep.sh"
        script.write_text("#!/bin/sh\nsetsid sleep 1000 & srun sleep 1000\n")
        job = cluster.sbatch(script, folder=tmp_path)
        cluster.wait_for(lambda: [p.name() for p in of(cluster)].count("sleep") == 2, 20, "the job's processes")
        assert cluster.state(job) == "RUNNING"
    assert of(cluster) == []


def test_a_cluster_ends_with_who_made_it(tmp_path):
    code = "import os, pathlib, sys; from tests.slurm.cluster import Cluster\n"
    code += "with Cluster(pathlib.Path(sys.argv[1]), nodes=1) as c: print(c.run(['sinfo'])); os.kill(os.getpid(), 9)"
    done = subprocess.run(
        [sys.executable, "-uc", code, str(tmp_path / "slurm")], cwd=ROOT, capture_output=True, timeout=60
    )
    assert b"idle" in done.stdout, done
    gone = Cluster(tmp_path / "slurm", nodes=1)
    gone.wait_for(lambda: of(gone) == [], 10, "no process of the cluster")


def of(cluster: Cluster) -> list[psutil.Process]:
    """Every process that has the cluster's configuration in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_CONF") == str(cluster.folder / "slurm.conf"):
                found.append(process)
        except psutil.Error:
            continue
    return found
