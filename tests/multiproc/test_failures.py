"""Peers that die or hang, and weights that were not swapped: the job ends, and says who and where."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from noflush.failure import last_words
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc


def die_in_the_middle(rank, victim):
    engine = t.build(4, t.ds_config(1, block={"peer_timeout_s": 15}))
    for call in range(50):
        if rank == victim and call == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        engine.train_batch(iter(t.data(1, seed=call)))


def accused(message):
    """The stages that an error accuses of having ended or of being silent."""
    return set(re.findall(r"[Ss]tage (\d) \(rank \d\) (?:is gone|has been silent|failed)", message))


@pytest.mark.parametrize("victim", range(4))
def test_a_dead_peer_ends_the_job_and_it_alone_is_accused(victim):
    start = time.monotonic()
    results = run_ranks(die_in_the_middle, 4, timeout=100, expect_errors=True, victim=victim)
    assert time.monotonic() - start < 80
    for rank, result in enumerate(results):
        if rank != victim:
            assert result[0] == "PeerError"
            assert f"stage {rank}" in result[1]
            # Stage 0 keeps the store: without it those that are not its neighbour cannot know, and say so.
            knows = victim != 0 or rank == 1
            assert accused(result[1]) == ({str(victim)} if knows else set()), result[1]
            if knows:
                assert f"tage {victim} (rank {victim}) is gone: its connection to stage" in result[1]
                assert "was closed" in result[1]


def stop_in_the_middle(rank, victim):
    engine = t.build(4, t.ds_config(1, block={"peer_timeout_s": 6}))
    for call in range(50):
        if rank == victim and call == 6:
            os.kill(os.getpid(), signal.SIGSTOP)
        engine.train_batch(iter(t.data(1, seed=call)))


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_stopped_peer_ends_the_others_and_it_alone_is_called_silent(victim):
    """Stage 0 keeps the store, which then takes questions and never answers."""
    start = time.monotonic()
    results = run_ranks(stop_in_the_middle, 4, timeout=60, expect_errors=True, victim=victim, stopped=[victim])
    assert time.monotonic() - start < 40  # 6 s of peer_timeout_s, and at most 6 more to hear the others
    for rank, result in enumerate(results):
        if rank != victim:
            assert result[0] == "PeerError"
            assert accused(result[1]) == {str(victim)}, result[1]
            assert "is gone" not in result[1]


def fail_alone(rank):
    engine = t.build(4, t.ds_config(1, block={"peer_timeout_s": 15}))
    if rank == 3:
        engine.module.loss_fn = engine.loss_model = lambda outputs, labels: Path("/nothing/here").read_text()
    for call in range(9):
        try:
            engine.train_batch(iter(t.data(1, seed=call)))
        except FileNotFoundError as error:
            sys.excepthook(type(error), error, error.__traceback__)  # as the interpreter would
            raise


def test_a_stage_that_fails_by_itself_says_what_and_the_others_repeat_it():
    *others, last = run_ranks(fail_alone, 4, timeout=100, expect_errors=True)
    assert last[0] == "FileNotFoundError"
    for result in others:
        assert result[0] == "PeerError"
        assert "tage 3 (rank 3) failed: FileNotFoundError: [Errno 2] No such file" in result[1]


def hang_in_the_middle(rank):
    engine = t.build(2, t.ds_config(1, block={"peer_timeout_s": 5}))
    for call in range(50):
        if rank == 1 and call == 4:
            time.sleep(20)
        engine.train_batch(iter(t.data(1, seed=call)))


def test_a_stuck_peer_ends_the_wait():
    first, second = run_ranks(hang_in_the_middle, 2, timeout=100, expect_errors=True)
    assert first[0] == "PeerError"
    assert "stage 0 gave up waiting for gradient" in first[1]
    assert "sent nothing for 5 s" in first[1]
    assert accused(first[1]) == {"1"}
    assert accused(second[1]) == set(), second[1]  # it was late itself, and the other has left because of it


def forget_the_swap(rank):
    engine = t.build(2, t.ds_config(1, block={"peer_timeout_s": 20}))
    if rank == 0:
        engine.pipeline_stage.runner.ring.bind_for_backward = lambda micro_batch: None
    for call in range(5):
        engine.train_batch(iter(t.data(1, seed=call)))


def test_a_missed_swap_fires_the_assert_in_the_engine():
    first, _ = run_ranks(forget_the_swap, 2, expect_errors=True)
    assert first[0] == "WeightVersionError"
    assert "backward of micro-batch 1 needs weight version 0" in first[1]


def dies_in_a_collective(rank):
    """Rank 1 is killed while all add up over the whole job; those without a connection to it do not notice."""
    t.build(4, t.ds_config(1, block={"peer_timeout_s": 20}))
    for _ in range(3):
        torch.distributed.all_reduce(torch.zeros(1))
    if rank == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        torch.distributed.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        raise RuntimeError(last_words.explain(error).sentence) from error


def test_a_rank_that_dies_in_a_collective_is_named_by_the_others():
    results = run_ranks(dies_in_a_collective, 4, timeout=60, expect_errors=True)
    said = [result[1] for rank, result in enumerate(results) if rank != 1]
    assert any("tage 1 (rank 1) is gone" in text for text in said), said
    for stage in (0, 2, 3):
        assert not any(f"stage {stage} (rank {stage}) is gone" in text for text in said[:2]), said
