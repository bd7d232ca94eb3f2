"""Checkpoints written while training goes on, and ones that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from noflush.demo.port import held_port
from noflush.stage.not_written import NotWrittenError
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks
from tests.multiproc.test_in_flight import (
    MUON,
    WARM_UP,
    assert_same,
    build,
    random_numbers,
    resumed,
    stream,
    undisturbed_and_saved,
)  # fmt: skip

pytestmark = pytest.mark.multiproc


def save_in_the_background(rank, folder, ends_at_once):
    engine, _ = build(3, t.ds_config(1, MUON, {"async_save": True}, **WARM_UP))
    written = threading.Event()
    real = type(engine.checkpoint_engine).save

    def slow(self, state, path):
        written.wait(60)
        real(self, state, path)

    type(engine.checkpoint_engine).save = slow
    try:
        data = stream(engine, 1, 12)
        for _ in range(4):
            engine.train_batch(data)
            engine.batch_losses()
        engine.save_checkpoint(folder, client_state={"random": random_numbers()})
        for _ in range(3):
            engine.train_batch(data)  # goes on over the weights that are being written
        there = sorted(path.name for path in Path(folder).iterdir())
        written.set()
        if ends_at_once:
            engine.finish_saves()
        else:
            found = [False] * 3
            while not all(found):
                time.sleep(0.05)
                engine.train_batch(iter(t.data(1)))
                dist.all_gather_object(found, Path(folder, "latest").exists())
        dist.barrier()
        return there, sorted(path.name for path in Path(folder).iterdir())
    finally:
        type(engine.checkpoint_engine).save = real


@pytest.mark.parametrize(
    "ends_at_once", [pytest.param(True, marks=pytest.mark.slow), False], ids=["waited for", "while training goes on"]
)
def test_a_checkpoint_is_written_while_training_goes_on(tmp_path, ends_at_once):
    """What is written are the copies: the resumed run is that of a blocking save, in place only when all is written."""
    config = t.ds_config(1, MUON, {}, **WARM_UP)
    blocking, background = tmp_path / "blocking", tmp_path / "background"
    run_ranks(undisturbed_and_saved, 3, stages=3, gas=1, config=config, folder=str(blocking), saves=(4,))
    found = run_ranks(save_in_the_background, 3, folder=str(background), ends_at_once=ends_at_once)
    for before, after in found:
        assert before == ["global_step4.partial"]
        assert after == ["global_step4", "latest"]
    ours, theirs = (sorted((folder / "global_step4").iterdir()) for folder in (background, blocking))
    assert [path.name for path in ours] == [path.name for path in theirs]
    run = {"stages": 3, "gas": 1, "config": config, "saves": (4,)}
    rests = [run_ranks(resumed, 3, folder=str(folder), **run) for folder in (background, blocking)]
    for (mine,), (other,) in zip(*(map(dict.values, rest) for rest in rests), strict=True):
        assert mine[:3] == other[:3]
        assert_same(mine[4], other[4])


def fill_the_disk(rank, folder, background):
    engine, _ = build(2, t.ds_config(1, t.NADAMW, {"async_save": background}))
    engine.train_batch(stream(engine, 1, 1))
    engine.save_checkpoint(folder, tag="whole")
    if background:
        engine.finish_saves()
    real = type(engine.checkpoint_engine).save

    def full(self, state, path):
        if "layer_04" in path:  # on the last stage
            raise OSError(28, "No space left on device", path)
        real(self, state, path)

    type(engine.checkpoint_engine).save = full
    try:
        engine.save_checkpoint(folder, tag="next")
        engine.finish_saves()
    except NotWrittenError as error:
        return str(error), sorted(path.name for path in Path(folder).iterdir()), Path(folder, "latest").read_text()
    finally:
        type(engine.checkpoint_engine).save = real


@pytest.mark.parametrize("background", [False, True])
def test_a_file_that_cannot_be_written_is_one_error_on_every_rank(tmp_path, background):
    first, second = run_ranks(fill_the_disk, 2, folder=str(tmp_path), background=background)
    assert first[0] == second[0]
    assert "layer_04-model_states.pt could not be written: No space left on device" in first[0]
    assert "checkpoint whole is whole, and the newest" in first[0]
    assert (sorted(path.name for path in tmp_path.iterdir()), first[2]) == (["latest", "whole"], "whole")


ENDS = """
import sys

import deepspeed
import torch.distributed as dist

import noflush

noflush.register()
deepspeed.init_distributed("gloo")
from tests.multiproc import training as t

engine = t.build(2, t.ds_config(1, block={"async_save": True}))
engine.train_batch(iter(t.data(1)))
engine.save_checkpoint(sys.argv[1])
dist.destroy_process_group()
"""


def test_a_script_that_ends_its_group_and_itself_loses_no_checkpoint(tmp_path):
    with held_port() as port:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", ENDS, str(tmp_path)],
                env=os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
                },
                cwd=Path(__file__).parents[2],
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            assert [rank.wait(100) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "latest"]
