"""Before all ranks have met: who is missing, too many or of another run is named, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import contextmanager

import pytest

from noflush.demo.port import held_port
from noflush.failure.keeper import keeper_watched
from noflush.launch.training.meeting import MeetingError, meet
from tests.multiproc.ranks import CONTEXT

pytestmark = [pytest.mark.multiproc]
SPLIT = "tensor 1 x pipeline 3 x data 1"


def _meet(pipe, rank, world, port, timeout, more, then):
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
    try:
        store = meet(rank, world, environ, timeout, more.get("split", SPLIT))
        pipe.send("met")
        then(store)
    except MeetingError as error:
        pipe.send(str(error))
    os._exit(0)


def _stay(store):
    time.sleep(60)


@contextmanager
def ranks(*each, timeout=4, then=_stay):
    """Processes that meet, each (rank, world, port, more of the environment); yields what reads their answers."""
    started = []
    for rank, world, port, more in each:
        here, there = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_meet, args=(there, rank, world, port, timeout, more, then))
        process.start()
        started.append((process, here))

    def answer(at, within=15):
        assert started[at][1].poll(within), f"process {at} has said nothing for {within} s"
        return started[at][1].recv()

    answer.processes = [process for process, _ in started]
    try:
        yield answer
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def test_all_meet():
    with held_port() as port, ranks(*((rank, 3, port, {}) for rank in range(3))) as answer:
        assert [answer(k) for k in range(3)] == ["met"] * 3


@pytest.mark.parametrize("missing", [1, 2])
def test_who_has_not_joined_is_named_and_who_has(missing):
    here = 3 - missing
    with held_port() as port, ranks((0, 3, port, {}), (here, 3, port, {})) as answer:
        for k in (0, 1):
            said = answer(k)
            assert f"rank {missing} of 3 has not joined at 127.0.0.1:{port} within 4 s" in said
            assert f"Here are rank 0 ({socket.gethostname()}, process " in said
            assert f"rank {here} ({socket.gethostname()}, process " in said


def test_a_rank_0_that_ends_before_all_have_joined_is_told_so():
    with held_port() as port, ranks((0, 3, port, {}), (1, 3, port, {}), timeout=8) as answer:
        time.sleep(2)
        answer.processes[0].kill()
        assert f"rank 1: the store at 127.0.0.1:{port} is gone: rank 0, which keeps it, ended before all" in answer(1)


def test_without_rank_0_the_address_is_named_and_what_was_seen_there():
    with held_port() as port, ranks((1, 2, port, {}), timeout=2) as answer:
        assert f"rank 1 found no rank 0 at 127.0.0.1:{port} within 2 s: nobody listens there" in answer(0)
    with ranks((1, 2, 1, {"MASTER_ADDR": "no.such.host.invalid"}), timeout=2) as answer:
        assert "at no.such.host.invalid:1 within 2 s: there is no host of that name" in answer(0)


def test_a_listener_that_says_nothing_holds_nobody():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        start = time.monotonic()
        with ranks((1, 2, port, {}), timeout=2) as answer:
            said = answer(0)
        assert f"at 127.0.0.1:{port} within 2 s: somebody accepts connections there, and does not answer" in said
        assert time.monotonic() - start < 14


def test_a_port_that_is_taken_is_named_with_the_remedy():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with ranks((0, 2, port, {})) as answer:
            said = answer(0)
        assert f"rank 0 cannot listen on port {port}, which another process of {socket.gethostname()} has" in said
        assert "--master_port" in said


def test_two_processes_of_one_rank_are_told_apart():
    with held_port() as port, ranks((0, 3, port, {}), (1, 3, port, {})) as answer:
        time.sleep(1)
        with ranks((1, 3, port, {})) as second:
            said = second(0)
        assert f"two processes are rank 1 of the run at 127.0.0.1:{port}" in said
        assert f"process {answer.processes[1].pid}, which was here before" in said
        assert "rank 2 of 3 has not joined" in answer(0)


@pytest.mark.parametrize(
    ("rank", "world", "more", "differs"),
    [
        (2, 3, {}, "world 3 here, 2 there"),
        (1, 2, {"split": "tensor 2 x pipeline 1 x data 1"}, "split tensor 2 x pipeline 1 x data 1 here"),
        (1, 2, {"SLURM_JOB_ID": "6"}, "job SLURM job 6, restart 0 here, SLURM job 7, restart 0 there"),
    ],
)
def test_a_rank_of_another_run_is_turned_away_and_the_run_goes_on(rank, world, more, differs):
    job = {"SLURM_JOB_ID": "7"}
    with held_port() as port, ranks((0, 2, port, job), timeout=8) as answer:
        with ranks((rank, world, port, job | more)) as stray:
            said = stray(0)
        assert f"rank {rank} of {world} has come to another run at 127.0.0.1:{port}: " in said
        assert differs in said
        with ranks((1, 2, port, job)) as late:
            assert late(0) == "met"
        assert answer(0) == "met"


def test_who_was_turned_away_is_told_to_those_that_wait_in_vain():
    with held_port() as port, ranks((0, 2, port, {})) as answer, ranks((2, 3, port, {})) as stray:
        assert "another run" in stray(0)
        said = answer(0)
        assert "rank 1 of 2 has not joined" in said
        assert f"Of another run, and so turned away: rank 2 of 3 ({socket.gethostname()}, process" in said


def _ask_for_ever(store):
    with keeper_watched(lambda: store, 2.0, "rank 0"):
        store.get("nothing")


def test_a_keeper_that_stops_while_groups_are_made_holds_nobody():
    with (
        held_port() as port,
        ranks((0, 2, port, {})) as keeper,
        ranks((1, 2, port, {}), then=_ask_for_ever) as asker,
    ):
        assert (keeper(0), asker(0)) == ("met", "met")
        os.kill(keeper.processes[0].pid, signal.SIGSTOP)
        asker.processes[0].join(15)
        assert asker.processes[0].exitcode == 1
