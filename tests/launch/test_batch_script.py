"""When launch/slurm/pretrain_gpt.sbatch tries again, with a made-up srun: the real one is in tests/slurm."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCONTROL = "#!/bin/sh\necho scontrol $* >&2\nexit 1\n"  # so the script ends rather than wait to be ended


def run(folder, srun, **more):
    """(exit status, output) of the script in a job whose ranks do ``srun``, a few lines of shell."""
    (folder / "bin").mkdir()
    for name, text in (("srun", f"#!/bin/sh\n{srun}\n"), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    environ = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}", "SAVE": str(folder / "save"), "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "x", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "a", "MASTER_ADDR": "a",
        **more,
    }  # fmt: skip
    (folder / "save").mkdir(exist_ok=True)
    command = ["bash", str(ROOT / "launch" / "slurm" / "pretrain_gpt.sbatch"), "--mock-data"]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("srun", "status", "said", "again"),
    [
        ("exit 0", 0, "finished", False),
        ("exit 1", 1, "no further than checkpoint none: not tried again", False),
        ("echo -n global_step4 > $SAVE/latest; exit 1", 1, "came from checkpoint none to global_step4", True),
        ("echo -n global_step4 > $SAVE/latest; exit 2", 2, "refused: see .*not tried again", False),
        # srun's status is the highest of its tasks', and it kills the others of one that has ended.
        (
            "echo -n global_step4 > $SAVE/latest; echo the disk is full > $SAVE/refused-17; exit 137",
            2, "refused: the disk is full: not tried again", False,
        ),
        ("echo -n global_step4 > $SAVE/latest; touch $SAVE/refused-3; exit 137", 1, "back into the queue", True),
        ("echo iteration 4 > $SAVE/stopped; exit 0", 1, "told to end .iteration 4.*back into the queue", True),
    ],
)  # fmt: skip
def test_a_job_is_tried_again_only_where_that_helps(tmp_path, srun, status, said, again):
    code, text = run(tmp_path, srun)
    assert code == status, text
    assert re.search(said, text), text
    assert ("scontrol requeue 17" in text) == again
    assert not (tmp_path / "save" / "refused-17").exists()


def test_one_task_of_an_array_is_not_tried_again_with_all_others(tmp_path):
    """One task's number is the array's, which SLURM takes for all of them."""
    srun = "echo -n global_step4 > $SAVE/latest; exit 1"
    _, text = run(tmp_path, srun, SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID="3")
    assert "scontrol requeue 17_3\n" in text


def test_a_refusal_of_an_earlier_try_is_forgotten(tmp_path):
    (tmp_path / "save").mkdir()
    (tmp_path / "save" / "refused-17").write_text("of old")
    code, text = run(tmp_path, "exit 0")
    assert (code, "finished" in text) == (0, True)
    assert not (tmp_path / "save" / "refused-17").exists()
