"""With a flush a stage that is done may wait for others within its update: that is bubble, not compute."""

from __future__ import annotations

import time

import pytest

from noflush.order.actions import Op
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks
from tests.multiproc.test_tied_layers import build as build_tied

pytestmark = pytest.mark.multiproc
LATE_S, CALLS = 0.5, 6


def update_seconds(rank, tied):
    if tied:
        engine, _ = build_tied(2, t.ds_config(1, block={"schedule": "1f1b_flush"}))
    else:
        config = t.ds_config(1, block={"schedule": "1f1b_flush", "clip": "global"}) | {"gradient_clipping": 1.0}
        engine = t.build(2, config)
    if rank == 0:
        next(engine.module.parameters()).register_hook(lambda gradient: time.sleep(LATE_S))
    batches = iter(t.data(CALLS))
    for _ in range(CALLS):
        engine.train_batch(batches)
    recorder = engine.pipeline_stage.recorder
    events = [event.end - event.start for event in recorder.events() if event.op is Op.UPDATE]
    return recorder.typical(Op.UPDATE), sorted(events)[CALLS // 2], recorder.totals()


@pytest.mark.parametrize("tied", [False, True], ids=["one norm", "tied gradients"])
def test_waiting_for_others_is_no_compute(tied):
    _, (typical, of_trace, (busy_ns, spent_ns)) = run_ranks(update_seconds, 2, tied=tied)
    assert 0 < typical < LATE_S / 2
    assert 0 < of_trace < LATE_S / 2
    assert spent_ns > CALLS * LATE_S * 1e9
    assert busy_ns < spent_ns / 2
