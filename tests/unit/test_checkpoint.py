"""A folder of checkpoints: which is the newest, what is refused, and that no link is followed."""

from __future__ import annotations

import os

import pytest

from noflush.stage.checkpoint import (
    PARTIAL,
    REPLACED,
    CheckpointError,
    checkpoints_in,
    is_tag,
    newest_complete,
    remove,
    write_latest,
    write_whole,
)


def make(folder, *tags):
    for tag in tags:
        (folder / tag).mkdir()
        (folder / tag / "mp_rank_00_model_states.pt").touch()


def test_an_empty_folder_and_none_hold_no_checkpoint(tmp_path):
    (tmp_path / "logs").mkdir()
    make(tmp_path, f"global_step4{PARTIAL}")  # it was never whole
    assert newest_complete(tmp_path) is None
    assert newest_complete(tmp_path / "none") is None
    assert checkpoints_in(tmp_path) == checkpoints_in(tmp_path / "none") == []


def test_they_are_listed_by_number(tmp_path):
    make(tmp_path, "global_step10", "global_step9", f"global_step9{REPLACED}", "mine")
    assert checkpoints_in(tmp_path) == ["global_step9", f"global_step9{REPLACED}", "global_step10", "mine"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda latest: None, "latest is missing, and .* holds global_step2, global_step4: name the one"),
        (lambda latest: latest.write_text(""), "latest is empty, and .* holds global_step2, global_step4"),
        (lambda latest: latest.write_text(" \n"), "latest is empty"),
        (lambda latest: latest.mkdir(), "latest is a folder, and .* holds global_step2, global_step4"),
        (lambda latest: latest.symlink_to("global_step4"), "latest is a folder"),
        (lambda latest: latest.symlink_to("nowhere"), "latest is no file that can be read"),
        (lambda latest: latest.write_text("global_step6"), "latest names global_step6, which is missing, and"),
        (
            lambda latest: latest.write_text("../other/global_step4"),
            "latest holds '../other/global_step4', which is",
        ),
        (lambda latest: latest.write_text(".."), "which is no folder's name"),
        (lambda latest: latest.write_text("/tmp"), "which is no folder's name"),
        (lambda latest: latest.write_text("a\x00b"), "which is no folder's name"),
        (lambda latest: latest.write_bytes(b"\xff\xfe"), "latest cannot be read"),
        (lambda latest: os.mkfifo(latest), "latest is no file that can be read"),
    ],
)
def test_a_latest_that_does_not_say_which_is_refused(tmp_path, damage, said):
    make(tmp_path, "global_step2", "global_step4")
    damage(tmp_path / "latest")
    with pytest.raises(CheckpointError, match=said):
        newest_complete(tmp_path)


def test_a_latest_that_names_what_is_gone_is_refused_in_an_empty_folder_too(tmp_path):
    write_latest(tmp_path, "global_step4")
    with pytest.raises(CheckpointError, match="holds no checkpoint: remove latest to begin anew"):
        newest_complete(tmp_path)


def test_one_that_was_named_and_not_yet_put_in_its_place_is_found(tmp_path):
    make(tmp_path, f"global_step4{PARTIAL}")
    write_latest(tmp_path, "global_step4")
    assert newest_complete(tmp_path) == f"global_step4{PARTIAL}"
    make(tmp_path, f"global_step4{REPLACED}")
    assert newest_complete(tmp_path) == f"global_step4{REPLACED}"
    make(tmp_path, "global_step4")
    assert newest_complete(tmp_path) == "global_step4"


def test_nothing_is_written_through_a_link(tmp_path):
    treasure = tmp_path / "treasure"
    treasure.write_text("keep")
    folder = tmp_path / "save"
    folder.mkdir()
    (folder / f"latest{PARTIAL}").symlink_to(treasure)
    (folder / "latest").symlink_to(treasure)
    write_latest(folder, "global_step4")
    assert treasure.read_text() == "keep"
    assert not (folder / "latest").is_symlink()
    assert (folder / "latest").read_text() == "global_step4"
    assert os.listdir(folder) == ["latest"]
    write_whole(folder / "latest", "global_step6")
    assert (folder / "latest").read_text() == "global_step6"


def test_of_a_link_the_link_alone_is_removed(tmp_path):
    make(tmp_path, "global_step4")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "global_step4")
    remove(link)
    remove(tmp_path / "not there")
    assert checkpoints_in(tmp_path) == ["global_step4"]
    remove(tmp_path / "global_step4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("word", "holds"), [("global_step4", True), ("", False), (".", False), ("a/b", False)])
def test_a_tag_is_a_plain_name(word, holds):
    assert is_tag(word) == holds
