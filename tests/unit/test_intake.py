"""A single stage's intake: nothing pulled is lost, nor anything told."""

from __future__ import annotations

import pytest
import torch

from noflush.stage.intake import DataExhausted, Intake
from noflush.stage.messages import Notices
from noflush.stage.prefetch import Prefetch

CPU = Prefetch(torch.device("cpu"))


def opened(intake, call, message, notices):
    """A single stage's call: there is nobody to take a header from, or hand it on to."""
    intake.begin(call, message, notices)
    intake.open(call)
    return intake.settle()


def test_skips_told_in_a_call_without_data_are_heard_in_the_next():
    data = iter([1])
    intake = Intake(2, True, lambda: next(data), CPU, None, None, None)
    with pytest.raises(DataExhausted, match="after 1 of 2 micro-batches"):
        opened(intake, 0, 0, Notices(skipped=(7,)))
    data = iter([2])
    assert opened(intake, 0, 0, Notices(skipped=(8,))).skipped == (7, 8)
    assert [intake.next(), intake.next()] == [1, 2]
    data = iter([3, 4])
    assert opened(intake, 1, 2, Notices()) == Notices()


def test_a_call_that_stops_the_run_pulls_nothing():
    intake = Intake(1, True, lambda: pytest.fail("pulled"), CPU, None, None, None)
    assert opened(intake, 5, 5, Notices(stopped_by=(2, 100))).stopped_by == (2, 100)
