"""Runs that no retry can mend end at once, on all ranks, with one message and exit status 2."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time

import pytest
import torch

from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.pretrain_gpt import settings_of
from noflush.launch.training.beside_weights import MANIFEST
from noflush.stage.checkpoint import newest_complete
from tests.launch.megatron import NADAMW
from tests.launch.processes import Run
from tests.launch.test_pretrain import arguments, finish
from tests.launch.test_saving import small_disk

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(280)]

BF16 = {
    "optimizer": NADAMW, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
    "async_pipeline": {"enabled": True},
}  # fmt: skip
COMMON = "--mock-data --pipeline-model-parallel-size 2"
BOUND = 45.0  # seconds, ten of them imports; nobody waits for a timeout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The --save folder of two stages in bf16 under ZeRO-1, checkpoints 2 and 4 of 4 iterations."""
    folder = tmp_path_factory.mktemp("trained")
    more = f"{COMMON} --bf16 --train-iters 4 --save {folder}/save --save-interval 2"
    finish(Run(arguments(folder, more, BF16), 2, folder, "run"))
    assert not (folder / "save" / "lock").exists()  # it was given free
    return folder / "save"


@pytest.fixture
def save(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "save")


def resume(tmp_path, save, more="", iterations=6):
    words = f"{COMMON} --bf16 --train-iters {iterations} --override-opt_param-scheduler --load {save} {more}"
    return Run(arguments(tmp_path, words, BF16), 2, tmp_path, "resumed")


def refused(run, *said):
    """Asserts that every rank ended in time with status 2 and rank 0 alone said why, in one paragraph."""
    codes = run.wait(BOUND)
    text = run.text(0)
    assert codes == [2, 2], text + run.text(1)
    for words in said:
        assert words in text, text
    for rank in range(2):
        assert "Traceback" not in run.text(rank), run.text(rank)
        assert "start again with --load" not in run.text(rank)
        assert "is gone" not in run.text(rank)
    assert len(re.findall(r"^noflush: --", text + run.text(1), re.MULTILINE)) == 1
    return text


class _Call:
    """Pickled, code that leaves a folder behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["mp_rank_01_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"])
def test_code_in_a_checkpoint_is_not_run_unless_trusted(save, tmp_path, name):
    path, witness = save / "global_step4" / name, tmp_path / "witness"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "extra": _Call(str(witness))}, path)
    (save / "global_step4" / MANIFEST).unlink()  # whoever plants code can change a list of sizes too
    refused(
        resume(tmp_path, save), f"--load {save}: {path} would run posix.mkdir when it is loaded", "--trust-checkpoint"
    )
    assert not witness.exists()
    if name.startswith("mp_rank"):
        assert sorted(finish(resume(tmp_path, save, "--trust-checkpoint"))) == [5, 6]
        assert witness.exists()


def test_a_part_cut_short_that_one_rank_alone_reads(save, tmp_path):
    path = save / "global_step4" / "layer_04-model_00-model_states.pt"
    os.truncate(path, path.stat().st_size // 2)
    words = f"{COMMON} --bf16 --train-iters 6 --override-opt_param-scheduler --load {save}"
    with pytest.raises(ArgumentsError, match=rf"{path} has \d+ bytes of the \d+ that were saved"):
        settings_of(arguments(tmp_path, words, BF16), 2)
    (save / "global_step4" / MANIFEST).unlink()  # as an older checkpoint
    refused(resume(tmp_path, save), f"{path} is cut short", "name another checkpoint by --ckpt-step")
    assert sorted(finish(resume(tmp_path, save, "--ckpt-step 2 --save " + str(tmp_path / "new")))) == [3, 4, 5, 6]


def test_a_schedule_that_is_another_is_not_told_to_start_again(save, tmp_path):
    words = f"{COMMON} --bf16 --train-iters 6 --lr 1e-2 --load {save}"
    run = Run(arguments(tmp_path, words, BF16), 2, tmp_path, "other")
    refused(run, f"--load {save}: checkpoint global_step4: ", "Give --override-opt_param-scheduler")


def test_a_second_run_into_the_same_folder_is_refused_and_the_first_goes_on(tmp_path):
    save = tmp_path / "save"
    words = f"{COMMON} --save {save} --load {save} --exit-signal-handler --train-iters 100000"
    first = Run(arguments(tmp_path, words), 2, tmp_path, "first")
    deadline = time.monotonic() + 90
    while len(first.losses()) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    second = Run(arguments(tmp_path, words), 2, tmp_path, "second")
    refused(second, f"--save {save}: a run (process {first.processes[0].pid} on ", f"holds {save}/lock; two runs")
    os.kill(first.processes[1].pid, signal.SIGUSR1)
    last = max(finish(first, 60))
    assert newest_complete(save) == f"global_step{last}"
    assert not (save / "lock").exists()


def test_a_disk_that_fills_up_ends_all_ranks_with_one_error(tmp_path):
    """The checkpoint before stays whole, and with room made the run goes on from it."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        save = disk / "save"
        words = f"{COMMON} --train-iters 8 --save {save} --load {save} --save-interval 2"
        finish(Run(arguments(tmp_path, f"{words} --exit-interval 2"), 2, tmp_path, "begun"))
        room = os.statvfs(disk)
        filler = disk / "filler"
        filler.write_bytes(b"\0" * (room.f_bavail * room.f_frsize - 100_000))
        run = Run(arguments(tmp_path, words), 2, tmp_path, "full")
        codes = run.wait(BOUND)
        assert codes == [2, 2], run.text(0) + run.text(1)
        said = re.findall(r"^noflush: .*could not be written: No space left on device.*$", run.text(0), re.MULTILINE)
        assert len(said) == 1
        assert "checkpoint global_step2 is whole, and the newest: make room or mend the disk" in said[0]
        assert "Traceback" not in run.text(0) + run.text(1)
        assert newest_complete(save) == "global_step2"
        assert not list(save.glob("*.partial"))
        assert not (save / "lock").exists()
        filler.unlink()
        assert sorted(finish(Run(arguments(tmp_path, words), 2, tmp_path, "again"))) == [3, 4, 5, 6, 7, 8]
        assert newest_complete(save) == "global_step8"
