"""A rank whose host stands in its device's queue still ends when a neighbour is gone, and names it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from unittest import mock

import pytest
import torch

from tests.multiproc import training as t
from tests.multiproc.ranks import RankError, run_ranks

pytestmark = pytest.mark.multiproc


GPT = t.GPT | {"depth": 6}


def build(stages, seconds):
    with (
        mock.patch("noflush.stage.stage.dist.get_backend", return_value="nccl"),
        mock.patch("noflush.stage.channels.dist.get_backend", return_value="nccl"),
    ):
        return t.build(stages, t.ds_config(1, block={"peer_timeout_s": seconds}), gpt=GPT)


def struck(rank, how, folder):
    """Stage 2 is struck in call 4, while stages 0 and 1 stand in call 5 as in a device's synchronisation."""
    engine = build(3, 8.0)
    stream = iter(t.data(9, gpt=GPT))
    for _ in range(4):
        engine.train_batch(stream)
    torch.distributed.barrier()
    if rank == 2:
        os.kill(os.getpid(), how)
        time.sleep(100)
    stand_still = mock.patch.object(engine.pipeline_stage.runner, "run_call", lambda: time.sleep(100))  # noqa: PT008
    with open(f"{folder}/{rank}", "w", buffering=1) as log, mock.patch("sys.stderr", log), stand_still:
        engine.train_batch(stream)


@pytest.mark.parametrize(
    ("how", "word"),
    [(signal.SIGKILL, "is gone"), pytest.param(signal.SIGSTOP, "has been silent", marks=pytest.mark.slow)],
)
def test_a_host_that_cannot_notice_ends_in_bounded_time(how, word, tmp_path):
    start = time.monotonic()
    # A stopped rank does not end; the others must, long before their sleep is over.
    ends = (
        contextlib.nullcontext() if how == signal.SIGKILL else pytest.raises(RankError, match=r"ranks \[2\] of 3 did")
    )
    with ends:
        run_ranks(struck, 3, timeout=45, expect_errors=True, how=how, folder=str(tmp_path))
    assert time.monotonic() - start < 60
    said = (tmp_path / "1").read_text()
    assert "stage 1 gave up working with stage 2" in said
    assert f"tage 2 (rank 2) {word}" in said


class Event:
    """What a device was told so far, and is not through with."""

    def query(self):
        return False


def left_in_the_queue(rank, folder):
    """Stage 2 is killed while stage 1's host has left the call and stands in a read of its loss, as in item()."""
    engine = build(3, 8.0)
    engine.pipeline_stage.watch.mark = Event
    stream = iter(t.data(9, gpt=GPT))
    for _ in range(4):
        engine.train_batch(stream)
    torch.distributed.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with open(f"{folder}/{rank}", "w", buffering=1) as log, mock.patch("sys.stderr", log):
        time.sleep(100)


def test_a_host_that_waits_for_its_device_after_a_call_ends_too(tmp_path):
    start = time.monotonic()
    run_ranks(left_in_the_queue, 3, timeout=45, expect_errors=True, folder=str(tmp_path))
    assert time.monotonic() - start < 40
    assert "stage 1 gave up working with stage 2" in (tmp_path / "1").read_text()


def replicas(rank, folder):
    """Two pipelines of two stages: one replica of stage 1 is killed; the other pipeline hears of it by the chain."""
    engine = build(2, 8.0)
    stream = iter(t.data(9, gpt=GPT))
    torch.distributed.barrier()
    if rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    stand_still = mock.patch.object(engine.pipeline_stage.runner, "run_call", lambda: time.sleep(100))  # noqa: PT008
    with open(f"{folder}/{rank}", "w", buffering=1) as log, mock.patch("sys.stderr", log), stand_still:
        engine.train_batch(stream)


def test_a_replicas_end_reaches_every_pipeline(tmp_path):
    start = time.monotonic()
    run_ranks(replicas, 4, timeout=60, expect_errors=True, folder=str(tmp_path))
    assert time.monotonic() - start < 50
    assert "stage 1 gave up working with stage 1 (rank 3)" in (tmp_path / "2").read_text()


def clean(rank):
    engine = build(3, 5.0)
    stream = iter(t.data(4, gpt=GPT))
    for _ in range(4):
        engine.train_batch(stream)
    engine.drain()
    torch.distributed.barrier()
    if rank == 0:
        time.sleep(12)  # stage 1 has gone meanwhile; between calls that is no fault
    return "done"


def test_a_neighbour_that_has_finished_is_no_fault():
    assert run_ranks(clean_and_apart, 3) == ["done"] * 3


def clean_and_apart(rank):
    result = clean(rank)
    torch.distributed.destroy_process_group()
    # What ends the rank in these tests is a barrier of all: give it one that needs nobody.
    torch.distributed.barrier = torch.distributed.destroy_process_group = lambda: None
    return result
