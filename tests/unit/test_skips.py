"""Skipped updates: read a call late, counted, judged by the first stage."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from noflush.methods.flat import Outcome
from noflush.order.schedule import Schedule
from noflush.stage.messages import BatchReports, ReportLayout
from noflush.stage.skips import SkippedUpdates, UpdateGuard


def outcome(finite):
    return Outcome(torch.tensor(1.0 if finite else math.inf), torch.tensor(0.0 if finite else 1.0))


def test_outcomes_are_read_in_order_and_not_before_their_time():
    skips = SkippedUpdates()
    for call, finite in enumerate([True, False, False, True, False]):
        skips.note(call, call + 1, outcome(finite))
    assert skips.settle(before=1) == []
    assert skips.settle(before=3) == [(2, math.inf), (3, math.inf)]
    assert (skips.total, skips.in_a_row) == (2, 2)
    assert skips.settle(before=3) == []
    assert skips.settle(before=5) == [(5, math.inf)]
    assert (skips.total, skips.in_a_row) == (3, 1)
    skips.note(5, 6, outcome(False))
    skips.restart(total=7)
    assert skips.settle(before=99) == []
    assert (skips.total, skips.in_a_row) == (7, 0)


def guard_of(stage, limit=2, stages=3):
    return UpdateGuard(Schedule(stages, 1), stage, ReportLayout(1, stages), limit, "there")


def test_a_skip_is_said_and_told(caplog):
    guard = guard_of(stage=1)
    guard.skips.note(4, 3, outcome(False))
    with caplog.at_level(logging.WARNING, "noflush"):
        notices = guard.notices(before=5)
    assert notices.skipped == (2,)  # update 3 was that of batch 2
    assert notices.stopped_by is None  # only the first stage judges
    assert "stage 1 skipped update 3: its gradient norm is inf (1 skipped in a row, 1 in all)" in caplog.text


def test_what_a_drain_reads_is_told_with_the_next_call():
    guard = guard_of(stage=1)
    guard.skips.note(4, 3, outcome(False))
    guard.settle(before=10**9)
    assert guard.notices(before=5).skipped == (2,)
    assert guard.notices(before=6).skipped == ()


@pytest.mark.parametrize("worst", [0, 2])
def test_the_first_stage_ends_the_run_for_any_stage(worst):
    guard = guard_of(stage=0)
    layout = ReportLayout(1, 3)
    for call in range(2):
        if worst == 0:
            guard.skips.note(call, call + 1, outcome(False))
        report = torch.full((layout.words,), math.nan, dtype=torch.float64)
        report[layout.in_a_row][1] = 1.0
        report[layout.in_a_row][2] = call + 1.0 if worst == 2 else 0.0
        guard.hear(call, call + 1, report)
    assert guard.notices(before=1).stopped_by is None
    assert guard.notices(before=2).stopped_by == (worst, 2)
    error = guard.error((worst, 2), "there/tag")
    assert f"stage {worst} skipped 2 updates in a row" in str(error)
    assert "there/tag" in str(error)
    guard.restart(total=0)
    assert guard.notices(before=99).stopped_by is None


def test_where_a_stopped_run_is_saved():
    guard = guard_of(stage=0)
    assert guard.stop_dir() == "there"
    guard = UpdateGuard(Schedule(2, 1), 0, ReportLayout(1, 2), 100)
    assert guard.stop_dir() == "noflush_stopped"
    guard.saved_to = "checkpoints"
    assert guard.stop_dir() == "checkpoints"


def test_reports_gather_every_stages_figures():
    layout = ReportLayout(2, 3)
    last, first = (BatchReports(layout, stage, torch.device("cpu")) for stage in (2, 0))
    last.bubble, first.bubble = 0.25, 0.5
    report = last.add(last.first(torch.tensor([1.5, 2.5]), 512.0), 7, skipped=4, in_a_row=2, stop=True)
    report = first.add(report, 7, skipped=0, in_a_row=0, stop=False)
    assert report[:2].tolist() == [1.5, 2.5]
    assert first.step == 7
    assert report[layout.in_a_row].tolist()[::2] == [0.0, 2.0]
    assert report[layout.stop] == 1.0
    assert first.scale() == 512.0
    assert first.skipped(mine=1) == [1, 0, 4]
    bubbles = first.bubbles()
    assert (bubbles[0], bubbles[2]) == (0.5, 0.25)
    assert math.isnan(bubbles[1])
    first.clear()
    assert first.scale() is None
    assert first.skipped(mine=1) == [1, 0, 0]
