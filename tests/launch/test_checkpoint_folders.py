"""What --load and --save name, looked at before anything is built: nothing is written over, no part is missing."""

from __future__ import annotations

import dataclasses
import os

import pytest

from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.arguments.settings import Checkpoints, Ranks
from noflush.launch.convert.state_dict import read_weights, write_checkpoint
from noflush.launch.pretrain_gpt import settings_of
from noflush.launch.training.beside_weights import (
    MANIFEST,
    WEIGHTS_ALONE,
    checkpoint_in,
    read_manifest,
    write_manifest,
)
from noflush.launch.training.folder_faults import folder_faults, listed_part_faults, load_part_faults, part_faults
from noflush.stage.checkpoint import PARTIAL, CheckpointError
from tests.launch.megatron import settings
from tests.launch.test_convert import LLAMA, weights
from tests.launch.test_pretrain import arguments

NONE = Checkpoints(None, None, None, False, True, True, True, False, False)


def make(folder, *tags, latest=None):
    for tag in tags:
        (folder / tag).mkdir(parents=True)
        (folder / tag / "mp_rank_00_model_states.pt").touch()
    if latest:
        (folder / "latest").write_text(latest)
    return str(folder)


def faults(trains=True, **changes):
    return folder_faults(dataclasses.replace(NONE, **changes), trains)


def only(found, *said):
    assert len(found) == 1, found
    for words in said:
        assert words in found[0], found
    return True


# ---- --load ------------------------------------------------------------------------------------------------


def test_a_whole_one_is_loaded_and_a_run_may_begin_in_an_empty_folder(tmp_path):
    run = make(tmp_path / "run", "global_step2", "global_step4", latest="global_step4")
    new = str(tmp_path / "new")
    assert faults(load=run) == faults(load=run, save=run) == faults(load=run, tag="global_step2", save=new) == []
    assert faults() == faults(save=new) == faults(save=new, load=new) == []
    # Killed while it wrote its first one.
    assert faults(save=make(tmp_path / "first", f"global_step2{PARTIAL}"), load=str(tmp_path / "first")) == []


def test_a_latest_that_is_lost_never_begins_anew_over_what_is_there(tmp_path):
    run = make(tmp_path / "run", "global_step2", "global_step4")
    only(faults(load=run, save=run), f"--load {run}: ", "latest is missing, and", "global_step2, global_step4")
    (tmp_path / "run" / "latest").write_text("")
    only(faults(load=run, save=run), "latest is empty, and", "global_step2, global_step4")
    assert faults(load=run, save=run, tag="global_step2") == []  # the user says which
    with pytest.raises(CheckpointError, match="latest is empty"):
        checkpoint_in(run)  # as generate.py and convert_checkpoint.py do


def test_pretrained_weights_do_not_take_the_place_of_a_run_whose_latest_is_lost(tmp_path):
    run = make(tmp_path / "run", "global_step2")
    start = make(tmp_path / "start", "global_step0", latest="global_step0")
    more = f"--mock-data --train-iters 4 --lr-warmup-iters 0 --save {run} --load {run} --pretrained-checkpoint {start}"
    with pytest.raises(ArgumentsError, match="latest is missing"):
        settings_of(arguments(tmp_path, more), 1)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ("none", "holds no checkpoint: give the folder of one, or leave --load out"),
        ("file", "is no folder: give the folder that was the run's --save"),
        ("empty", "holds no checkpoint: give the folder of one"),
        ("run/global_step4", "is one checkpoint: give --load {folder}/run --load-tag global_step4"),
    ],
)
def test_a_load_that_holds_nothing_is_refused(tmp_path, load, said):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    make(tmp_path / "run", "global_step4", latest="global_step4")
    only(faults(load=str(tmp_path / load), save=str(tmp_path / "new")), said.format(folder=tmp_path))


@pytest.mark.parametrize("tag", ["global_step7", "../run/global_step4", "", "latest"])
def test_a_step_that_is_not_there_names_those_that_are(tmp_path, tag):
    run = make(tmp_path / "run", *(f"global_step{step}" for step in range(2, 14, 2)), latest="global_step12")
    said = f"has no checkpoint {tag}; it has 6 checkpoints up to global_step8, global_step10, global_step12"
    only(faults(load=run, tag=tag), said)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    run = make(tmp_path / "run", "global_step4", latest="global_step4")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("noflush.launch.training.folder_faults.newest_complete", refuse)
    only(faults(load=run), f"{run} cannot be read: Permission denied")


# ---- --save ------------------------------------------------------------------------------------------------


def test_checkpoints_that_nothing_loads_are_not_written_over(tmp_path):
    run = make(tmp_path / "run", "global_step2", latest="global_step2")
    other = make(tmp_path / "other", "global_step9", latest="global_step9")
    for load in (None, other):
        only(faults(save=run, load=load), f"--save {run} holds global_step2, from which", f"Give --load {run} to go on")
    assert faults(save=run, load=f"{tmp_path}/./run") == []
    link = tmp_path / "link"
    link.symlink_to(run)
    assert faults(save=run, load=str(link)) == []
    assert faults(save=run, trains=False) == []
    only(faults(save=make(tmp_path / "lost", "mine")), "holds mine")


def test_finetuning_in_the_folder_of_a_run_is_refused_and_in_that_of_imported_weights_not(tmp_path):
    run = make(tmp_path / "run", "global_step2", latest="global_step2")
    only(faults(save=run, load=run, finetune=True), "--finetune begins at iteration 0: it would write over them")
    (tmp_path / "run" / "global_step2" / WEIGHTS_ALONE).touch()
    assert faults(save=run, load=run, finetune=True) == []


# ---- the parts ---------------------------------------------------------------------------------------------


@pytest.fixture
def imported(tmp_path):
    return write_checkpoint(tmp_path / "im", weights(LLAMA), LLAMA, 2)


def ranks(pipeline=1, tensor=2, data=1):
    return Ranks(pipeline * tensor * data, tensor, pipeline, "gloo", 10)


def test_a_whole_checkpoint_lists_its_files(imported):
    assert part_faults(imported, LLAMA, ranks(), False) == []
    sizes = read_manifest(imported)
    assert sizes == {path.name: path.stat().st_size for path in imported.glob("*.pt")}
    assert {"layer_00-model_00-model_states.pt", "mp_rank_00_model_states.pt"} <= sizes.keys()


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["layer_00-model_01-model_states.pt", "mp_rank_00_model_states.pt"])
def test_a_missing_file_is_named(imported, name, listed):
    if not listed:
        (imported / MANIFEST).unlink()  # as older checkpoints
        assert part_faults(imported, LLAMA, ranks(), False) == []
    (imported / name).unlink()
    only(part_faults(imported, LLAMA, ranks(), False), f"{imported} is incomplete: {name} missing (1 files); copy it")


def test_a_stages_file_that_is_gone_is_no_checkpoint_of_fewer_stages(tmp_path):
    """What the list names is asked before how the run is split: else it passes for one of fewer stages."""
    checkpoint = tmp_path / "run" / "global_step2"
    checkpoint.mkdir(parents=True)
    for name in ("layer_01-model_00-model_states.pt", "mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"):
        (checkpoint / name).write_bytes(b"1")
    write_manifest(checkpoint)
    (tmp_path / "run" / "latest").write_text("global_step2")
    here = dataclasses.replace(NONE, load=str(tmp_path / "run"))
    assert listed_part_faults(here) == listed_part_faults(NONE) == []
    (checkpoint / "mp_rank_01_model_states.pt").unlink()
    only(listed_part_faults(here), "is incomplete: mp_rank_01_model_states.pt missing (1 files); copy it")


def test_a_file_of_another_size_is_named(imported):
    name = "layer_01-model_00-model_states.pt"
    size = (imported / name).stat().st_size
    os.truncate(imported / name, size - 100)
    only(part_faults(imported, LLAMA, ranks(), False), f"{name} has {size - 100} bytes of the {size} that were saved")


@pytest.mark.parametrize("text", ["{", "[]", '{"a": null}', "7"])
def test_a_broken_list_is_said(imported, text):
    (imported / MANIFEST).write_text(text)
    only(part_faults(imported, LLAMA, ranks(), False), f"{MANIFEST} is no list of files")


def test_shards_of_the_optimizer_are_counted(imported):
    (imported / MANIFEST).unlink()
    (imported / WEIGHTS_ALONE).unlink()
    (imported / "mp_rank_01_model_states.pt").touch()
    only(
        part_faults(imported, LLAMA, ranks(), True),
        "zero_pp_rank_0_mp_rank_00_optim_states.pt, zero_pp_rank_0_mp_rank_01_optim_states.pt missing (2 files)",
    )
    for replica, stage in ((0, 0), (0, 1), (1, 0)):
        (imported / f"bf16_zero_pp_rank_{replica}_mp_rank_{stage:02d}_optim_states.pt").touch()
    only(part_faults(imported, LLAMA, ranks(), True), "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt missing (1 f")


def test_an_optimizer_of_more_replicas_is_for_an_engine_that_re_cuts_it(imported, tmp_path):
    (imported / WEIGHTS_ALONE).unlink()
    (imported / MANIFEST).unlink()
    for stage in range(2):
        (imported / f"mp_rank_{stage:02d}_model_states.pt").touch()
        for replica in range(2):
            (imported / f"bf16_zero_pp_rank_{replica}_mp_rank_{stage:02d}_optim_states.pt").touch()
    found = dataclasses.replace(
        settings("", 1, tmp_path),
        model=LLAMA,
        ranks=ranks(),
        deepspeed={"bf16": {"enabled": True}},
        checkpoints=dataclasses.replace(NONE, load=str(imported.parent)),
    )
    stock = dataclasses.replace(found, block=None)
    only(load_part_faults(stock), "shards of 2 data-parallel replicas, and this run has 1, and DeepSpeed's own engine")
    assert load_part_faults(dataclasses.replace(stock, ranks=ranks(data=2))) == []
    assert load_part_faults(found) == []
    (imported / "mp_rank_00_model_states.pt").unlink()
    only(load_part_faults(found), "is incomplete: mp_rank_00_model_states.pt missing (1 files); copy it")
    assert read_weights(imported, LLAMA)
