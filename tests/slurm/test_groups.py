"""launch/slurm/replicas.sbatch on a real SLURM: of an array of two groups one dies and comes back, or is cancelled."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import HEAD, Cluster, ClusterError
from tests.slurm.test_slurm import CONFIG, LINE, MODEL, ROOT, SCRIPT, pytestmark  # noqa: F401

BATCH = ROOT / "launch" / "slurm" / "replicas.sbatch"
LIGHTHOUSE = f"{HEAD}:29510"
STAGES, GROUPS = 2, 2
# Some .3 s an iteration on two cores: long enough for a group to come back while the other trains.
ITERATIONS, SHORT, SAVE_INTERVAL = 500, 200, 10
# Seconds, to end what hangs.
START, END = 200, 400


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster") / "slurm", nodes=STAGES * GROUPS, life=1500) as cluster:
        lighthouse = ["--bind", LIGHTHOUSE, "--min_replicas", "1", "--join_timeout_ms", "2000"]
        cluster.daemon("lighthouse", [str(Path(sys.executable).parent / "torchft_lighthouse"), *lighthouse])
        yield cluster


class Groups:
    """An array job in a folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path, iterations: int = ITERATIONS, reroute: bool = False):
        self.cluster, self.folder = cluster, folder
        replicas = {
            "lighthouse": "$LIGHTHOUSE",
            "bind": "auto",
            "average_every": 5,
            "fraction": 0.25,
            "timeout_s": 30.0,
            "reroute": reroute,
        }
        block = CONFIG["async_pipeline"] | {"replicas": replicas}
        (folder / "replicas.json").write_text(json.dumps(CONFIG | {"async_pipeline": block}))
        words = [
            MODEL,
            f"--pipeline-model-parallel-size {STAGES} --deepspeed_config {folder}/replicas.json",
            f"--train-iters {iterations} --save-interval {SAVE_INTERVAL}",
        ]
        (folder / "gpt.args").write_text("\n".join(words))
        environment = {"SAVE": str(folder / "runs"), "SCRIPT": str(SCRIPT), "PYTHON": sys.executable}
        environment |= {"REROUTE": "1"} if reroute else {}
        self.tasks = cluster.sbatch_array(
            GROUPS,
            BATCH,
            f"@{folder}/gpt.args",
            options=[f"--nodes={STAGES}", "--ntasks-per-node=1", "--cpus-per-task=2"],  # all of a node
            environment=environment | {"LIGHTHOUSE": LIGHTHOUSE, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            folder=folder,
        )

    def log(self, group: int, restart: int, rank: int = STAGES - 1) -> str:
        job = self.cluster.job(self.tasks[group])["JobId"]
        path = self.folder / "runs" / f"group-{group}" / "logs" / f"noflush-groups-{job}-{restart}-{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def losses(self, group: int, restart: int = 0) -> dict[int, float]:
        """Iteration -> loss as printed."""
        return {int(i): float(loss) for i, loss in re.findall(LINE, self.log(group, restart))}

    def reached(self, group: int, restart: int = 0) -> int:
        return max(self.losses(group, restart), default=0)

    def saved(self, group: int) -> int:
        latest = self.folder / "runs" / f"group-{group}" / "latest"
        return int(re.sub(r"\D", "", latest.read_text())) if latest.exists() else 0

    def restarts(self) -> list[int]:
        return [int(self.cluster.job(task)["Restarts"]) for task in self.tasks]

    def nodes(self, group: int) -> list[str]:
        listed = self.cluster.job(self.tasks[group])["NodeList"]
        return self.cluster.run(["scontrol", "show", "hostnames", listed]).split()

    def wait(self, predicate, timeout: float, what: str) -> None:
        """As the cluster's, but a task that has ended on the way is an error at once."""

        def holds():
            if predicate():
                return True
            ended = {task: self.cluster.state(task) for task in self.tasks}
            if set(ended.values()) & {"FAILED", "CANCELLED", "TIMEOUT", "COMPLETED"}:
                raise ClusterError(f"{ended}; waited for: {what}\n{self.cluster.report()}")
            return False

        self.cluster.wait_for(holds, timeout, what)


TOLD = f"groups: {GROUPS} (group 0, group 1)"


def test_a_cancelled_group_is_gone_for_good_and_the_other_trains_on(cluster, tmp_path):
    groups = Groups(cluster, tmp_path, iterations=SHORT)
    groups.wait(lambda: TOLD in groups.log(0, 0, 0) and TOLD in groups.log(1, 0, 0), START, "groups that have met")
    goes = next(n for n, task in enumerate(groups.tasks) if cluster.job(task)["JobId"] == task.partition("_")[0])
    stays = 1 - goes
    groups.wait(lambda: groups.reached(goes) > 1, START, "some training")
    cluster.run(["scancel", groups.tasks[goes]])
    cluster.wait_for(lambda: cluster.state(groups.tasks[goes]) == "CANCELLED", START, "the group cancelled")
    left = groups.reached(stays)
    assert left < SHORT

    assert cluster.wait_for_end(groups.tasks[stays], END) == "COMPLETED"
    assert list(groups.losses(stays)) == list(range(min(groups.losses(stays)), SHORT + 1))
    assert groups.log(stays, 0, 0).rpartition("groups: ")[2].startswith("1 (")
    assert groups.saved(stays) == SHORT
    assert groups.restarts() == [0] * GROUPS
    assert cluster.state(groups.tasks[goes]) == "CANCELLED"


def test_a_group_of_an_array_dies_comes_back_and_goes_on_where_the_other_is(cluster, tmp_path):
    groups = Groups(cluster, tmp_path)
    groups.wait(lambda: TOLD in groups.log(0, 0, 0) and TOLD in groups.log(1, 0, 0), START, "groups that have met")
    # SLURM gives one task of an array the array's own number, and means all of them by it.
    dies = next(n for n, task in enumerate(groups.tasks) if cluster.job(task)["JobId"] == task.partition("_")[0])
    lives = 1 - dies
    groups.wait(lambda: groups.saved(dies) and groups.reached(dies) > SAVE_INTERVAL + 1, START, "a checkpoint")
    for process in cluster.tasks(groups.nodes(dies)[0], SCRIPT.name):
        process.kill()
    groups.wait(lambda: groups.restarts()[dies] == 1, START, "the group back in the queue")
    left = groups.reached(dies)
    cluster.requeue_now(groups.tasks[dies])
    groups.wait(lambda: groups.reached(dies, 1) > 0, START, "the group training again")
    alive = groups.reached(lives)
    assert groups.restarts()[lives] == 0
    assert alive < ITERATIONS

    assert [cluster.wait_for_end(task, END) for task in groups.tasks] == ["COMPLETED"] * GROUPS
    again = groups.losses(dies, 1)
    # Not where its own checkpoint is, but where the other group was by then; with weights that have learnt.
    assert left < min(again) <= alive + 1
    assert f"goes on from a peer's weights, after {min(again) - 1} updates" in groups.log(dies, 1, 0)
    assert abs(again[min(again)] - groups.losses(lives)[min(again)]) < 0.1
    assert groups.restarts()[lives] == 0
    assert list(groups.losses(lives)) == list(range(min(groups.losses(lives)), ITERATIONS + 1))
    assert groups.reached(dies, 1) == ITERATIONS
    assert groups.log(lives, 0, 0).count(TOLD) >= 2  # before, and after
    for group in range(GROUPS):
        assert groups.saved(group) == ITERATIONS
        assert "finished, checkpoint" in cluster.output(groups.tasks[group])


def test_a_killed_rank_comes_back_within_its_job(cluster, tmp_path):
    """Its pipeline goes on through the other group's last stage meanwhile, and no job is queued again."""
    groups = Groups(cluster, tmp_path, iterations=ITERATIONS, reroute=True)
    groups.wait(lambda: TOLD in groups.log(0, 0, 0) and TOLD in groups.log(1, 0, 0), START, "groups that have met")
    groups.wait(lambda: groups.reached(0) > 20, START, "some training")
    for process in cluster.tasks(groups.nodes(0)[-1], SCRIPT.name):
        process.kill()
    groups.wait(lambda: "stands in from micro-batch" in groups.log(0, 0, 0), START, "a stand-in")
    groups.wait(lambda: "stage 1 is back" in groups.log(0, 0, 0), END, "the rank that was killed")
    for task in groups.tasks:
        assert cluster.wait_for_end(task, END) == "COMPLETED"
    assert groups.restarts() == [0] * GROUPS
    assert max(groups.losses(0)) == max(groups.losses(1)) == ITERATIONS
