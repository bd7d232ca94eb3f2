"""Two runs never save into one folder; a run that was started again, or is gone, is no second one."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import threading
import time

import pytest

from noflush.launch.refusal import RefusedError
from noflush.launch.training import folder_lock
from noflush.launch.training.folder_lock import LOCK, FolderLock, Holder, is_gone, myself

SLURM = {"SLURM_JOB_ID": "17"}
_fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A tenth of the times."""
    for name in ("BEAT", "WATCH", "_SETTLED"):
        monkeypatch.setattr(folder_lock, name, getattr(folder_lock, name) / 20)


def plant(folder, **changes):
    """The lock of a run on another machine."""
    holder = dataclasses.replace(myself({}), host="elsewhere", machine="another", token="theirs", **changes)
    (folder / LOCK).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def holder_of(folder):
    return Holder(**json.loads((folder / LOCK).read_text()))


def test_it_says_who_and_is_gone_afterwards(tmp_path):
    folder = tmp_path / "not" / "there"
    lock = FolderLock(folder, SLURM | {"SLURM_RESTART_COUNT": "2"})
    found = holder_of(folder)
    assert (found.pid, found.job, found.restart, found.host) == (os.getpid(), "SLURM job 17", 2, os.uname().nodename)
    assert str(found) == f"SLURM job 17 (process {os.getpid()} on {found.host}, since {found.since})"
    lock.check()
    lock.release()
    assert os.listdir(folder) == []
    FolderLock(folder, {}).release()


def test_a_second_run_of_this_machine_is_refused_at_once(tmp_path):
    lock = FolderLock(tmp_path, SLURM)
    begin = time.monotonic()
    with pytest.raises(
        RefusedError, match=rf"--save {tmp_path}: SLURM job 17 \(process .*\) holds {tmp_path}/{LOCK}; .*"
    ):
        FolderLock(tmp_path, SLURM)  # another step of the same job
    assert time.monotonic() - begin < folder_lock.WATCH
    lock.check()
    lock.release()


def _hold(folder, ready):
    FolderLock(folder, {})
    ready.set()
    time.sleep(60)


def test_a_killed_run_of_this_machine_is_taken_over_at_once(tmp_path):
    ready = _fork.Event()
    process = _fork.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    with pytest.raises(RefusedError, match=f"process {process.pid} on"):
        FolderLock(tmp_path, {})
    process.kill()
    process.join()
    lock = FolderLock(tmp_path, {})
    assert holder_of(tmp_path).pid == os.getpid()
    lock.release()


def test_a_number_that_another_process_has_got_is_no_run():
    me = myself({})
    assert is_gone(dataclasses.replace(me, begun=me.begun - 1), me) is True
    assert is_gone(me, me) is False
    assert is_gone(dataclasses.replace(me, pid=2**22 + 1), me) is True
    assert is_gone(dataclasses.replace(me, machine="another"), me) is None


@pytest.mark.parametrize(
    ("environ", "before", "gone"),
    [
        (SLURM | {"SLURM_RESTART_COUNT": "1"}, {"job": "SLURM job 17", "restart": 0}, True),
        (SLURM | {"SLURM_RESTART_COUNT": "1"}, {"job": "SLURM job 17", "restart": 1}, None),
        (SLURM | {"SLURM_RESTART_COUNT": "1"}, {"job": "SLURM job 18", "restart": 0}, None),
        (SLURM, {"job": "", "restart": 0}, None),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "1"}, {"job": "torchrun x", "restart": 0}, True),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}, {"job": "", "restart": 0}, None),
    ],
)
def test_a_job_that_was_started_again_takes_over(tmp_path, environ, before, gone):
    holder = plant(tmp_path, **before)
    assert is_gone(holder, myself(environ)) is gone
    if gone:
        begin = time.monotonic()
        FolderLock(tmp_path, environ).release()
        assert time.monotonic() - begin < folder_lock.WATCH


def test_a_lock_from_elsewhere_that_nobody_touches_is_taken_over_after_a_while(tmp_path):
    plant(tmp_path)
    begin = time.monotonic()
    lock = FolderLock(tmp_path, {})
    assert folder_lock.WATCH <= time.monotonic() - begin < 10 * folder_lock.WATCH
    lock.check()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_lock_from_elsewhere_that_is_touched_is_held(tmp_path):
    plant(tmp_path, job="SLURM job 3")
    stop = threading.Event()

    def beat():
        while not stop.wait(folder_lock.BEAT):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(
            RefusedError, match=r"SLURM job 3 \(process .* on elsewhere.*Wait for its end, or give another"
        ):
            FolderLock(tmp_path, {})
    finally:
        stop.set()
        thread.join()
    assert holder_of(tmp_path).token == "theirs"


def test_it_is_touched_while_it_is_held(tmp_path):
    lock = FolderLock(tmp_path, {})
    os.utime(tmp_path / LOCK, (0, 0))
    deadline = time.monotonic() + 20
    while (tmp_path / LOCK).stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lock.release()


@pytest.mark.parametrize(
    ("lose", "said"),
    [
        (lambda path: path.unlink(), "is gone, so it saves no more there"),
        (lambda path: plant(path.parent), "was taken over by a run .* on elsewhere"),
        (lambda path: path.write_text("?"), "is gone"),
    ],
)
def test_who_has_lost_it_saves_no_more_and_leaves_the_others_alone(tmp_path, lose, said):
    lock = FolderLock(tmp_path, {})
    lose(tmp_path / LOCK)
    left = sorted(os.listdir(tmp_path))
    with pytest.raises(RefusedError, match=said):
        lock.check()
    lock.release()
    assert sorted(os.listdir(tmp_path)) == left


def test_no_link_is_followed(tmp_path):
    treasure = tmp_path / "treasure"
    treasure.write_text("keep")
    folder = tmp_path / "save"
    folder.mkdir()
    (folder / LOCK).symlink_to(treasure)
    lock = FolderLock(folder, {})
    lock.check()
    lock.release()
    assert treasure.read_text() == "keep"


def test_what_cannot_be_a_lock_is_said(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(RefusedError, match=rf"its lock {tmp_path}/{LOCK} cannot be written \(Is a directory\)"):
        FolderLock(tmp_path, {})


def _race(folder, results, start):
    start.wait()
    try:
        lock = FolderLock(folder, {})
        time.sleep(3)
        lock.check()
        results.put("held")
    except RefusedError:
        results.put("refused")


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_the_same_moment_one_has_it(tmp_path, stale):
    if stale:
        plant(tmp_path)
    results, start = _fork.Queue(), _fork.Event()
    processes = [_fork.Process(target=_race, args=(tmp_path, results, start)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    outcomes = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert outcomes == ["held"] + ["refused"] * 5
