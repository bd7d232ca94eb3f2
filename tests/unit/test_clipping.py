"""Which batch's norm of the whole pipeline is known when: by the messages of a pipeline, played one by one."""

from __future__ import annotations

import math

import pytest
import torch

from noflush.order.actions import Op
from noflush.order.clipping import known_batch, newest_finite
from noflush.order.one_f_one_b import compute_of_call
from noflush.order.schedule import Schedule
from noflush.stage.messages import BatchNorm, Header, Notices, StageFigures
from noflush.stage.pipeline_norm import PipelineNorm


def norm_of(stage, batch):
    return 1.0 + stage + 10.0 * batch


class Pipeline:
    """Stages that do nothing but hand norms on, as `Stage` has its `PipelineNorm` do."""

    def __init__(self, schedule, counts=lambda stage: True):
        self.schedule = schedule
        self.norms = [PipelineNorm(counts(s)) for s in range(schedule.stages)]
        self.reports = [{} for _ in range(schedule.stages)]  # by batch, from the stage below
        self.calls = 0
        self.used = [{} for _ in range(schedule.stages)]  # by the update's batch

    def call(self):
        told = self.norms[0].tell(before=self.calls - 1)
        for norm in self.norms:
            norm.hear(self.calls, told)
        # From the last stage on: in a call a stage waits for what the one below sends in it.
        for s in reversed(range(self.schedule.stages)):
            for action in compute_of_call(self.schedule, s, self.calls):
                if action.op is Op.BACKWARD and (action.index + 1) % self.schedule.gas == 0:
                    self.report(s, action.index // self.schedule.gas)
                elif action.op is Op.UPDATE:
                    self.used[s][action.index] = self.norms[s].of_update(action.index)
                    self.norms[s].note(torch.tensor(norm_of(s, action.index)))
        self.calls += 1

    def report(self, s, batch):
        zero = torch.zeros((), dtype=torch.float64)
        squares = self.norms[s].add_to(self.reports[s].pop(batch, zero))
        if s:
            self.reports[s - 1][batch] = squares
        else:
            self.norms[0].arrived(self.calls, batch, squares)  # of the batch before, counted from 1


@pytest.mark.parametrize(("stages", "gas", "extra"), [(1, 1, 0), (2, 1, 0), (3, 2, 0), (4, 1, 0), (4, 1, 3), (8, 3, 0)])
def test_every_stage_clips_a_batch_by_the_norm_that_the_rule_names(stages, gas, extra):
    schedule = Schedule(stages, gas, extra_in_flight=extra)
    pipeline = Pipeline(schedule)
    for _ in range(30):
        pipeline.call()
    for used in pipeline.used:
        assert len(used) >= 30 - schedule.loss_lag(0)
        for batch, norm in used.items():
            known = known_batch(schedule, batch)
            whole = 0.0 if known < 0 else math.sqrt(sum(norm_of(s, known) ** 2 for s in range(stages)))
            assert norm == pytest.approx(whole, rel=1e-6)
    assert pipeline.norms[-1].newest.step == known_batch(schedule, 29) + 1


def test_a_shared_norm_counts_once():
    pipeline = Pipeline(Schedule(3, 1, "1f1b_flush"), counts=lambda stage: stage == 0)
    for _ in range(6):
        pipeline.call()
    assert pipeline.norms[2].newest == BatchNorm(3, norm_of(0, 2))


def test_a_skipped_updates_norm_is_passed_over():
    assert newest_finite([1.0, 2.0, math.inf, math.nan], 3) == 2.0
    assert newest_finite([math.nan, 2.0], 0) is None
    assert newest_finite([1.0], -1) is None
    first = PipelineNorm()
    for call, square in enumerate([4.0, math.inf, math.nan]):
        first.arrived(call, call + 1, torch.tensor(square, dtype=torch.float64))
    assert first.tell(before=99) == BatchNorm(1, 2.0)


def test_a_header_carries_it():
    figures = (StageFigures(3, 5), StageFigures(7, 11))
    for told in (None, BatchNorm(12, 0.1)):
        header = Header(2, True, Notices((4, 9), None, True, told, figures))
        assert Header.read(header.words()) == header


def test_a_new_segment_knows_nothing_and_a_log_does():
    pipeline = Pipeline(Schedule(2, 1))
    for _ in range(8):
        pipeline.call()
    last = pipeline.norms[1]
    newest = last.newest
    snapshot = last.snapshot()
    last.restart()
    assert last.of_update(8) == 0.0
    assert last.newest == newest is not None
    assert pipeline.norms[0].tell(before=99) is not None
    pipeline.norms[0].restart()
    assert pipeline.norms[0].tell(before=99) is None
    resumed = PipelineNorm()
    resumed.resume(snapshot, torch.device("cpu"))
    assert resumed.newest == newest
    assert resumed.snapshot() == snapshot
