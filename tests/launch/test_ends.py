"""How a run ends and what it leaves: whose fault it was, whole checkpoints, and an evaluation that goes on."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.pretrain_gpt import settings_of
from noflush.stage.checkpoint import REPLACED, newest_complete, write_latest
from tests.launch.megatron import settings
from tests.launch.processes import Run
from tests.launch.test_pretrain import arguments, finish
from tests.multiproc.ranks import run_ranks

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(280)]
MORE = "--mock-data --pipeline-model-parallel-size 2"


def _fail_alone(rank, run):
    """What the ranks say when rank 1 alone has a fault of its own."""
    from noflush.failure.last_words import explain
    from noflush.launch.training.start import join

    join(run.ranks)
    try:
        if rank == 1:
            raise OSError("No space left on device\nand more")
        torch.distributed.barrier()
    except Exception as error:
        said = explain(error)
        if rank == 1:
            torch.distributed.destroy_process_group()  # as its end would
        return said.accused, said.sentence


def test_a_rank_with_a_fault_of_its_own_accuses_nobody_and_is_repeated(tmp_path):
    run = settings("--pipeline-model-parallel-size 2", 2, tmp_path)
    results = run_ranks(_fail_alone, 2, run=run, expect_errors=True)
    assert results == [(1, "stage 1 (rank 1) failed: OSError: No space left on device")] * 2


def test_errors_about_peers_are_told_from_a_ranks_own():
    from noflush.failure.last_words import is_about_peers
    from noflush.stage.channels import PeerError

    gloo = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:16769")
    late = RuntimeError("Application timeout caused pair closure")
    assert all(is_about_peers(e) for e in (PeerError("x"), gloo, late, torch.distributed.DistNetworkError("x")))
    own = (OSError("No space left"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), StopIteration())
    assert not any(is_about_peers(e) for e in own)


def test_the_advice_names_only_what_is_there(tmp_path):
    from noflush.launch.training.last_words import advice

    def given(save, load):
        return advice(dataclasses.replace(none, save=save and str(tmp_path / save), load=load and str(tmp_path / load)))

    none = settings("", 1, tmp_path).checkpoints
    (tmp_path / "full" / "global_step4").mkdir(parents=True)
    write_latest(tmp_path / "full", "global_step4")
    (tmp_path / "empty").mkdir()
    assert given(None, None).startswith("nothing was saved: give --save")
    for save in ("empty", "not_there"):
        assert given(save, save) == f"no checkpoint is complete in {tmp_path / save} yet: start again as before"
        assert f"global_step4, start again with --load {tmp_path / 'full'}" in given(save, "full")
    assert f"global_step4, start again with --load {tmp_path / 'full'}" in given("full", None)


def test_a_checkpoint_of_a_name_that_is_there_replaces_it_whole(tmp_path):
    save = tmp_path / "save"
    finish(Run(arguments(tmp_path, f"{MORE} --train-iters 4 --save {save} --save-interval 2"), 2, tmp_path, "first"))
    (save / "global_step4" / "stale.pt").write_text("of another layout")
    again = f"{MORE} --train-iters 4 --save {save} --load {save} --ckpt-step 2"
    finish(Run(arguments(tmp_path, again), 2, tmp_path, "again"))
    assert newest_complete(save) == "global_step4"
    assert not (save / "global_step4" / "stale.pt").exists()
    assert sorted(path.name for path in save.iterdir() if path.is_dir()) == ["global_step2", "global_step4"]


def test_while_one_makes_room_for_another_it_is_still_found(tmp_path):
    (tmp_path / f"global_step4{REPLACED}").mkdir()
    write_latest(tmp_path, "global_step4")
    assert newest_complete(tmp_path) == f"global_step4{REPLACED}"
    (tmp_path / "global_step4").mkdir()
    assert newest_complete(tmp_path) == "global_step4"


def test_a_stop_at_an_evaluation_evaluates_and_later_ones_go_on(tmp_path):
    save = tmp_path / "save"
    more = f"{MORE} --train-iters 8 --eval-iters 2 --eval-interval 2 --save {save} --save-interval 4"
    validated = re.compile(r"validation loss at iteration (\d+) \| lm loss value: (\S+)")
    whole = Run(arguments(tmp_path, more), 2, tmp_path, "whole")
    finish(whole)
    stopped = Run(arguments(tmp_path, f"{more} --exit-interval 4 --save {save}2"), 2, tmp_path, "stopped")
    finish(stopped)
    resumed = Run(arguments(tmp_path, f"{more} --save {save}2 --load {save}2"), 2, tmp_path, "resumed")
    finish(resumed)
    assert validated.findall(stopped.text(-1)) + validated.findall(resumed.text(-1)) == validated.findall(
        whole.text(-1)
    )


def _dtypes(rank, run):
    from noflush.launch.training.start import build_engine, join
    from noflush.stage import update as stage_update

    join(run.ranks)
    engine = build_engine(run)
    update = engine.pipeline_stage.update
    assert isinstance(update, stage_update.FusedUpdate)
    return update.wire, engine.pipeline_stage.weights.collect_gradients()[0].dtype


@pytest.mark.parametrize("more", ["", "--accumulate-allreduce-grads-in-fp32", "--use-distributed-optimizer"])
def test_bf16_gradients_are_added_up_and_reduced_in_float32(more, tmp_path):
    run = settings(f"--bf16 --global-batch-size 4 {more}", 2, tmp_path)
    assert run_ranks(_dtypes, 2, run=run) == [(torch.float32, torch.float32)] * 2


@pytest.mark.parametrize(("how", "expected"), [("uniform", 4), ("block", 2)])
def test_as_many_layers_recompute_as_are_asked_for(how, expected, tmp_path):
    more = f"--recompute-granularity full --recompute-method {how} --recompute-num-layers 2"
    run = settings(more, 1, tmp_path)
    assert run_ranks(_recomputed, 1, run=run) == [expected]


def _recomputed(rank, run):
    from noflush.launch.gpt.pipeline import build_pipeline
    from noflush.launch.training.start import join

    join(run.ranks)
    return sum(getattr(layer, "_recompute", False) for layer in build_pipeline(run).forward_funcs)


@pytest.mark.parametrize("name", ["SIGKILL", "STOP", "9"])
def test_a_signal_nobody_can_hear_is_no_exit_signal(name, tmp_path):
    with pytest.raises(ArgumentsError, match=f"--exit-signal {name}: no signal that a program can hear"):
        settings_of(arguments(tmp_path, f"{MORE} --train-iters 2 --exit-signal-handler --exit-signal {name}"), 2)
