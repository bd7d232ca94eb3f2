"""What else may happen to a pipeline without a stage: who stands in dies too, more stages die, it comes back and dies
again; and what such a group can do no more."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time

import pytest

from tests.multiproc import training as t
from tests.multiproc.groups import lighthouse, run_groups
from tests.multiproc.lost_stages import train_losing

pytestmark = pytest.mark.multiproc

FAST = {"timeout_s": 3.0}


def whole(result, calls):
    """That the group has got to its end, whichever ranks it lost: its first stage has heard of every batch's loss."""
    assert isinstance(result[0], dict), result
    heard = result[0]["heard"]
    assert sorted(heard) == list(range(1, calls + 1))
    assert all(math.isfinite(loss) for loss in heard.values())


def lose(stages, groups, **more):
    with lighthouse(min_groups=len(groups)) as where:
        return run_groups(train_losing, stages, groups, where=where, stages=stages, slow=0.05, extra=FAST, **more)


class DieServing:
    """The first process that has served ten pieces of work dies, or stops; ``mark`` says that one has."""

    def __init__(self, mark, how=signal.SIGKILL):
        self.mark, self.how = mark, how

    def __call__(self, engine, call):
        if len(engine.group.lost_stages.rerouting.guests.served) >= 10 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), self.how)


@pytest.mark.slow
def test_who_stands_in_dies_too_and_the_third_group_serves_both(tmp_path):
    mark = tmp_path / "died"
    groups = [
        {"name": "a", "seed": 1, "calls": 60, "dies": {1: 12}, "expect_errors": True},
        {"name": "b", "seed": 50, "calls": 160, "between": DieServing(mark), "expect_errors": True},
        {"name": "c", "seed": 90, "calls": 160, "between": DieServing(mark), "expect_errors": True},
    ]
    results = lose(3, groups)
    whole(results[0], 60)
    (dead,) = [n for n in (1, 2) if results[n][1] == ()]
    left = results[3 - dead]
    whole(left, 160)
    served = left[1]["served"]
    keys = {one.key.rpartition("/")[0] for one in served}
    assert keys == {"a", groups[dead]["name"]}
    first = min(one.micro_batch for one in served if one.key.startswith(groups[dead]["name"]))
    heard = results[dead][0]["heard"] if isinstance(results[dead][0], dict) else None
    assert heard is None or sorted(heard) == list(range(1, 161))
    assert first > 12


@pytest.mark.slow
def test_who_stands_in_stands_still_and_another_is_asked(tmp_path):
    """Silence on the line, while the group that stands still waits as long as it would without detours."""
    mark, ended = tmp_path / "stopped", tmp_path / "ended"
    stops = {"calls": 3000, "until": ended, "between": DieServing(mark, signal.SIGSTOP), "expect_errors": True}
    groups = [
        {"name": "a", "seed": 1, "calls": 60, "dies": {1: 12}, "expect_errors": True, "ended": ended},
        {"name": "b", "seed": 50, **stops, "stopped": (1,)},
        {"name": "c", "seed": 90, **stops, "stopped": (1,)},
    ]
    a, *_ = lose(3, groups, peer_timeout_s=45.0)
    assert mark.exists()
    whole(a, 60)


@pytest.mark.parametrize(("stages", "dies"), [(4, {1: 12, 3: 12}), (5, {1: 12, 3: 20})])
@pytest.mark.slow
def test_two_stages_that_are_no_neighbours(stages, dies):
    groups = [
        {"name": "a", "seed": 1, "calls": 40, "dies": dies, "expect_errors": True},
        {"name": "b", "seed": 50, "calls": 120},
    ]
    a, b = lose(stages, groups)
    assert [rank for rank, result in enumerate(a) if result == ()] == sorted(dies)
    whole(a, 40)
    whole(b, 120)


@pytest.mark.slow
def test_it_comes_back_and_dies_again():
    groups = [
        {"name": "a", "seed": 1, "calls": 140, "dies": {1: 12}, "dies_again": 90, "comes_back": (1, 1.0),
         "expect_errors": True},
        {"name": "b", "seed": 50, "calls": 260},
    ]  # fmt: skip
    a, b = lose(3, groups)
    assert a[1] == ()
    whole(a, 140)
    whole(b, 260)
    pieces = [one.micro_batch for one in b[1]["served"] if one.kind == "B"]
    gap = next(after - before for before, after in itertools.pairwise(pieces) if after - before > 1)
    assert gap > 10  # in between it was there
    assert pieces == sorted(pieces)
    assert pieces[-1] == 139


@pytest.mark.slow
def test_it_comes_back_and_its_neighbour_dies():
    """Its channels are lines from the start, and go round the neighbour all the same."""
    groups = [
        {"name": "a", "seed": 1, "calls": 140, "dies": {2: 12, 1: 90}, "comes_back": (2, 1.0), "expect_errors": True},
        {"name": "b", "seed": 50, "calls": 260},
    ]
    a, b = lose(3, groups)
    assert a[1] == ()
    whole(a, 140)
    assert a[2]["began"] < 90
    assert b[1]["served"]
    assert b[2]["served"]


@pytest.mark.parametrize(
    ("dies", "said"),
    [
        ({1: 12, 2: 12}, "stage 0 gave up"),
        pytest.param({0: 12}, "stage 1 gave up", marks=pytest.mark.slow),
    ],
)
def test_where_nobody_can_go_round_the_group_ends_and_the_others_go_on(dies, said):
    """Two stages next to each other; and the first."""
    begun = time.monotonic()
    groups = [
        {"name": "a", "seed": 1, "calls": 500, "dies": dies, "expect_errors": True},
        {"name": "b", "seed": 50, "calls": 60},
    ]
    a, b = lose(4, groups)
    assert time.monotonic() - begun < 100
    left = [result for result in a if result != ()]
    assert {kind for kind, _ in left} <= {"PeerError", "RuntimeError", "DistNetworkError"}
    assert any(said in message for _, message in left)
    whole(b, 60)


def save_and_evaluate(engine, call, folder):
    if call not in (5, 30):
        return None
    saved = engine.save_checkpoint(folder, tag=str(call))
    return saved, float(engine.eval_batch(iter(t.data(1, seed=3)), compute_loss=True))


class Saving:
    """`save_and_evaluate` into a folder, for processes."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, engine, call):
        return save_and_evaluate(engine, call, self.folder)


def test_a_group_without_a_stage_neither_saves_nor_evaluates(tmp_path):
    groups = [
        {"name": "a", "seed": 1, "calls": 40, "dies": {1: 12}, "between": Saving(str(tmp_path)), "expect_errors": True},
        {"name": "b", "seed": 50, "calls": 120},
    ]
    a, _ = lose(3, groups)
    whole(a, 40)
    for rank in (a[0], a[2]):
        before, after = [kept for kept in rank["kept"] if kept is not None]
        assert before[0]
        assert math.isfinite(before[1])
        assert not after[0]
        assert math.isnan(after[1])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["5"]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 2])
def test_links_that_code_what_they_carry(lost):
    """Near what it is without: each link's forms are those of the stage that is lost."""
    groups = [
        {"name": "a", "seed": 1, "calls": 40, "dies": {lost: 12}, "expect_errors": True},
        {"name": "b", "seed": 50, "calls": 120},
    ]
    plain, coded = (lose(3, groups, wire=wire)[0][0]["heard"] for wire in ("model", "int8"))
    assert sorted(coded) == sorted(plain) == list(range(1, 41))
    assert all(abs(coded[call] - plain[call]) < 0.05 for call in plain)
    assert any(coded[call] != plain[call] for call in plain)


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "lost"), [(4, (1, 2)), (5, (3, 1))])
def test_two_groups_that_each_need_the_other(tmp_path, stages, lost):
    """Each serves while it waits for what the other serves: nobody's turn may wait for its own.

    Whoever has made its last call serves no more, so the other may not get to its end.
    """
    groups = [
        {"name": name, "seed": seed, "calls": 60, "dies": {stage: call}, "expect_errors": True,
         "between": Progress(tmp_path, name)}
        for name, seed, stage, call in (("a", 1, lost[0], 12), ("b", 50, lost[1], 16))
    ]  # fmt: skip
    lose(stages, groups)
    for name, gone in zip("ab", lost, strict=True):
        reached = {rank: int((tmp_path / f"{name}{rank}").read_text()) for rank in range(stages)}
        assert reached.pop(gone) < 20
        assert min(reached.values()) > 45, (name, reached)


class Progress:
    """Leaves in a file of each rank how many calls it has made."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name

    def __call__(self, engine, call):
        (self.folder / f"{self.name}{engine.global_rank}").write_text(str(call + 1))


@pytest.mark.slow
def test_a_last_stage_that_dies_within_a_batch():
    """Of the batch's loss the half is known that was computed by who stands in: its mean is told, not half of it."""
    groups = [
        {"name": "a", "seed": 1, "calls": 30, "dies_after": 50, "expect_errors": True},
        {"name": "b", "seed": 50, "calls": 80},
    ]
    a, _ = lose(3, groups, gas=4)
    whole(a, 30)
    heard = a[0]["heard"]
    assert abs(heard[13] - (heard[12] + heard[14]) / 2) < 0.3
