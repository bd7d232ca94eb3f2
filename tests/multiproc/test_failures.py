"""Peers that die or hang, and weights that were not swapped: the job ends, and says who and where."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc


def die_in_the_middle(rank, victim):
    engine = t.build(4, t.ds_config(1, block={"peer_timeout_s": 15}))
    for call in range(50):
        if rank == victim and call == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        engine.train_batch(iter(t.data(1, seed=call)))


@pytest.mark.parametrize("victim", [0, 2, 3])
def test_a_dead_peer_ends_the_job_and_is_named(victim):
    start = time.monotonic()
    results = run_ranks(die_in_the_middle, 4, timeout=100, expect_errors=True, victim=victim)
    assert time.monotonic() - start < 80
    for rank, result in enumerate(results):
        if rank != victim:
            assert result[0] == "PeerError"
            assert f"stage {rank}" in result[1]
    neighbour = results[victim + 1 if victim < 3 else 2]
    assert f"stage {victim} (rank {victim})" in neighbour[1]


def hang_in_the_middle(rank):
    engine = t.build(2, t.ds_config(1, block={"peer_timeout_s": 5}))
    for call in range(50):
        if rank == 1 and call == 4:
            time.sleep(20)
        engine.train_batch(iter(t.data(1, seed=call)))


def test_a_stuck_peer_ends_the_wait():
    first, _ = run_ranks(hang_in_the_middle, 2, timeout=100, expect_errors=True)
    assert first[0] == "PeerError"
    assert "stage 0 gave up waiting for gradient" in first[1]
    assert "sent nothing for 5 s" in first[1]


def forget_the_swap(rank):
    engine = t.build(2, t.ds_config(1, block={"peer_timeout_s": 20}))
    if rank == 0:
        engine._nf_runner.ring.bind_for_backward = lambda micro_batch: None
    for call in range(5):
        engine.train_batch(iter(t.data(1, seed=call)))


def test_a_missed_swap_fires_the_assert_in_the_engine():
    first, _ = run_ranks(forget_the_swap, 2, expect_errors=True)
    assert first[0] == "WeightVersionError"
    assert "backward of micro-batch 1 needs weight version 0" in first[1]
