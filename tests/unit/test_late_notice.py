"""A wait that takes long is told of, again after twice the time, and forgotten when it is over."""

from __future__ import annotations

import re
import time

import pytest

from noflush.stage.late_notice import LateNotice
from noflush.stage.peer import Attention


def notice(timeout_s=10.0):
    attention, lines = Attention(timeout_s), []
    return attention, LateNotice(attention, "stage 2 (rank 5)", timeout_s, lines.append), lines


def test_nothing_is_said_of_no_wait_and_of_a_short_one():
    attention, watch, lines = notice()
    watch.look()
    attention.waiting = "waiting for gradient 7 from stage 3 (rank 6)", time.monotonic() - 0.5
    watch.look()
    assert lines == []


def test_a_long_wait_is_told_of_and_told_again_later():
    attention, watch, lines = notice()
    for waited in (1.2, 1.3, 1.9, 2.1, 2.2, 4.2):  # the first after a tenth of ten seconds
        attention.waiting = "waiting for gradient 7 from stage 3 (rank 6)", 1000.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda waited=waited: 1000.0 + waited)
            watch.look()
    assert [re.search(r"for (\d+) s now", line)[1] for line in lines] == ["1", "2", "4"]
    assert lines[0] == (
        "noflush: stage 2 (rank 5) is waiting for gradient 7 from stage 3 (rank 6) for 1 s now; it gives up after 10 s"
    )
    attention.waiting = "waiting for gradient 8 from stage 3 (rank 6)", 1004.2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: 1005.5)
        watch.look()
    assert "gradient 8" in lines[-1]


def test_a_minute_is_long_however_patient_one_is():
    attention, watch, lines = notice(timeout_s=7200.0)
    attention.waiting = "waiting for activation 1 from stage 1 (rank 1)", time.monotonic() - 61
    watch.look()
    assert len(lines) == 1
