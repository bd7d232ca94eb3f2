"""A checkpoint on its way to the disk: killed at any step, in the way of links, out of room."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import noflush.stage.checkpoint
from noflush.launch.arguments.progress import Position
from noflush.launch.arguments.settings import Tokens
from noflush.launch.refusal import RefusedError, marker, say_refused
from noflush.launch.training import checkpoint
from noflush.launch.training.beside_weights import read_manifest, read_model
from noflush.launch.training.folder_lock import FolderLock
from noflush.stage.checkpoint import PARTIAL, newest_complete
from tests.launch.test_checkpoint_folders import NONE
from tests.launch.test_convert import LLAMA
from tests.multiproc.ranks import run_ranks

TOKENS = Tokens("NullTokenizer", None, None, None, 79, 0, False)
FILES = "mp_rank_00_model_states.pt", "layer_00-model_00-model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


class Writer:
    def save(self, state_dict, path):
        torch.save(state_dict, path)


class Engine:
    """What `checkpoints.save` sees of DeepSpeed's engine, writing files of ``size`` floats."""

    def __init__(self, size=10):
        self.checkpoint_engine, self.size = Writer(), size

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        assert not save_latest
        for name in FILES:
            state = {"weight": torch.full((self.size,), float(client_state["noflush"]["iteration"]))}
            self.checkpoint_engine.save(state, path=f"{folder}/{tag}/{name}")
        self._copy_recovery_script(folder)

    def _copy_recovery_script(self, folder):
        Path(folder, "zero_to_fp32.py").write_text("script")


@pytest.fixture(autouse=True)
def alone(tmp_path):
    """A group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(folder, iteration, size=10, lock=None):
    settings = dataclasses.replace(NONE, save=str(folder), save_rng=False)
    checkpoint.save(Engine(size), settings, LLAMA, TOKENS, Position(iteration=iteration), lock)


def whole(folder):
    """Iteration of the newest complete checkpoint, each of whose files holds it; None without one."""
    tag = newest_complete(folder)
    if tag is None:
        return None
    values = {torch.load(folder / tag / name)["weight"].unique().item() for name in FILES}
    assert len(values) == 1
    assert read_manifest(folder / tag) == {name: (folder / tag / name).stat().st_size for name in FILES}
    assert read_model(folder / tag) == LLAMA
    return int(values.pop())


class KilledError(BaseException):
    pass


def kill_at(monkeypatch, step):
    """Ends the process, as it were, before the ``step``-th time that something appears, moves or goes."""
    count = itertools.count()

    def counted(real):
        def act(*args, **kwargs):
            if next(count) == step:
                raise KilledError
            return real(*args, **kwargs)

        return act

    for owner, name in (
        (os, "replace"), (Path, "rename"), (Path, "mkdir"), (Path, "unlink"), (Path, "write_text"),
        (noflush.stage.checkpoint.shutil, "rmtree"), (Writer, "save"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return count


@pytest.mark.parametrize(
    ("before", "iteration"), [((), 2), ((2,), 4), ((2, 4), 4)], ids=["the first", "a later one", "one of its name"]
)
def test_killed_at_any_step_there_is_a_whole_one_and_the_run_goes_on(tmp_path, monkeypatch, before, iteration):
    seen = set()
    for step in range(100):
        folder = tmp_path / str(step)
        for earlier in before:
            save(folder, earlier)
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            killed = False
            try:
                save(folder, iteration)
            except KilledError:
                killed = True
        found = whole(folder)  # and it is no error
        seen.add(found)
        assert found in {before[-1] if before else None, iteration}, step
        save(folder, iteration + 2)
        assert whole(folder) == iteration + 2
        if not killed:
            break
    assert step > 8
    assert seen == {before[-1] if before else None, iteration}


def test_no_link_is_followed(tmp_path):
    treasure, folder = tmp_path / "treasure", tmp_path / "save"
    treasure.mkdir()
    folder.mkdir()
    names = ("model.json", *FILES)
    for name in names:
        (treasure / name).write_text("keep")
    for name in (f"global_step2{PARTIAL}", "global_step2", f"global_step2{noflush.stage.checkpoint.REPLACED}"):
        (folder / name).symlink_to(treasure)
    for name in (f"latest{PARTIAL}", "latest", "zero_to_fp32.py"):
        (folder / name).symlink_to(treasure / "model.json")
    save(folder, 2)
    assert whole(folder) == 2
    assert {(treasure / name).read_text() for name in names} == {"keep"}
    assert sorted(os.listdir(treasure)) == sorted(names)
    assert [path.name for path in folder.iterdir() if path.is_symlink()] == []
    (folder / "global_step4").symlink_to("nowhere")
    save(folder, 4)
    assert whole(folder) == 4


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_error_and_what_was_there_stays(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as folder:
        save(folder, 2)
        with pytest.raises(RefusedError) as error:
            save(folder, 4, size=100_000)
        said = str(error.value)
        for words in (
            f"{folder}/global_step4{PARTIAL}/{FILES[2]} could not be written: No space left on device; ",
            " MiB are free there. checkpoint global_step2 is whole, and the newest: make room or mend the disk, then "
            f"start again with --load {folder}",
        ):
            assert words in said
        assert whole(folder) == 2
        assert sorted(os.listdir(folder)) == ["global_step2", "latest", "zero_to_fp32.py"]
        save(folder, 4)
        assert whole(folder) == 4


@pytest.mark.parametrize("room", range(0, 40_000, 4096))
def test_a_disk_that_is_full_at_any_file(tmp_path, room):
    with small_disk(tmp_path / "disk", "128k") as folder:
        save(folder, 2)
        free = os.statvfs(folder)
        (folder / "other").write_bytes(b"\0" * max(0, free.f_bavail * free.f_frsize - room))
        said = None
        try:
            save(folder, 4)
        except RefusedError as error:
            said = str(error)
        assert said is None or "No space left on device" in said
        assert whole(folder) == (4 if said is None else 2)
        assert [name for name in os.listdir(folder) if name.endswith(PARTIAL)] == []


def test_who_lost_the_folder_saves_nothing_there(tmp_path):
    lock = FolderLock(tmp_path / "save", {})
    save(tmp_path / "save", 2, lock=lock)
    lock.path.unlink()
    with pytest.raises(RefusedError, match="is gone, so it saves no more there"):
        save(tmp_path / "save", 4, lock=lock)
    assert whole(tmp_path / "save") == 2
    assert not (tmp_path / "save" / f"global_step4{PARTIAL}").exists()
    lock.release()


def test_a_refusal_is_said_once_and_leaves_a_marker_for_its_job(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("noflush.launch.refusal._AFTER_RANK_0", 0.0)
    job = {"SLURM_JOB_ID": "17"}
    assert say_refused(RefusedError("this is so", everywhere=True), 1, str(tmp_path), job) == 2
    assert capsys.readouterr().err == ""
    assert say_refused(RefusedError("this is so", everywhere=True), 0, str(tmp_path), job) == 2
    assert say_refused(RefusedError("that of mine"), 1, None, job) == 2
    assert say_refused(RefusedError("and"), 0, str(tmp_path / "none"), job) == 2  # no folder to leave it in
    assert capsys.readouterr().err == "noflush: this is so\nnoflush: that of mine\nnoflush: and\n"
    assert os.listdir(tmp_path / "..").count("none") == 0
    assert marker(str(tmp_path), "17").read_text() == "this is so\n"


def _cannot_write_on_the_last_rank(rank, folder):
    """Rank 1 alone may write no file of more than 2000 bytes, once."""
    outcomes = []
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for iteration in (2, 4, 6):
        if rank and iteration == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
        try:
            settings = dataclasses.replace(NONE, save=folder, save_rng=False)
            engine = Engine(1000)
            if rank:
                global FILES
                FILES = tuple(name.replace("00", "01") for name in FILES)
            checkpoint.save(engine, settings, LLAMA, TOKENS, Position(iteration=iteration))
            outcomes.append("saved")
        except RefusedError as error:
            outcomes.append(f"{error} {error.everywhere}")
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return outcomes


@pytest.mark.multiproc
def test_what_one_rank_cannot_write_every_rank_says(tmp_path):
    first, last = run_ranks(_cannot_write_on_the_last_rank, 2, timeout=60, folder=str(tmp_path / "save"))
    assert first == last
    assert (first[0], first[2]) == ("saved", "saved")
    assert f"{tmp_path}/save/global_step4{PARTIAL}/mp_rank_01_model_states.pt could not be written: " in first[1]
    assert "checkpoint global_step2 is whole" in first[1]
    assert first[1].endswith(" True")
    assert newest_complete(tmp_path / "save") == "global_step6"
    assert not list((tmp_path / "save").glob(f"*{PARTIAL}"))
