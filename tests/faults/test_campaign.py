"""The campaign covers every stage and phase, and reads every sentence that accuses."""

from __future__ import annotations

import itertools

from noflush.failure.blame import Words, judge
from tests.faults.campaign import _FAULTS, ACCUSED
from tests.faults.cases import CASES, PHASES


def test_every_stage_in_every_phase_is_killed_and_stopped():
    assert len(CASES) >= 60
    names = {case.name for case in CASES}
    for fault, phase, stage in itertools.product(("kill", "stop"), PHASES, range(3)):
        assert f"plain: {fault}, {phase}, stage {stage}" in names
    assert {case.fault for case in CASES} - {"kill", "stop", "stop, continue"} == set(_FAULTS)


def test_every_verdict_that_accuses_is_read_and_no_other():
    """The driver would otherwise miss an accusation whose words have changed."""
    owns = [
        Words(1, fault="OSError: x"),
        *(Words(1, lost=lost, how=how, seconds=9) for lost in (None, 0, 2) for how in ("closed", "silent")),
    ]
    others = [
        (),
        (Words(2, fault="ValueError: y"),),
        (Words(2, lost=1, how="silent"),),
        (Words(0), Words(2, lost=3, how="silent", seconds=3)),
        (Words(2, lost=0, how="silent"), Words(0, lost=2, how="silent")),
    ]
    seen = set()
    for own, said, store, keeper in itertools.product(owns, others, ("answers", "refuses", "silent"), (0, None)):
        for name in (lambda rank: f"stage {rank} (rank {rank})", "rank {}".format):
            found = judge(own, {words.rank: words for words in said}, 4, store, keeper, name)
            assert ACCUSED.findall(found.sentence) == ([] if found.accused is None else [str(found.accused)]), found
            seen.add(found.accused)
    assert seen == {None, 0, 1, 2, 3}
