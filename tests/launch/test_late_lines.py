"""The log never waits for the device: an iteration's losses are read when the next one has been started."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from noflush.launch.arguments.progress import Position
from noflush.launch.signals import Signals
from noflush.launch.training import loop
from tests.launch.megatron import settings

READS = ("cpu", "item", "tolist", "numpy", "__float__", "__bool__", "__int__", "to")


class Engine:
    """Trains nothing, and notes when it is asked to."""

    optimizer = None

    def __init__(self, events, losses):
        self._events, self._losses = events, losses
        self.calls = 0

    def train_batch_size(self):
        return 2

    def train_batch(self, data_iter):
        self.calls += 1
        self._events.append(f"train {self.calls}")
        loss = self._losses[self.calls - 1]
        if isinstance(loss, Exception):
            raise loss
        return torch.tensor(loss)

    def eval_batch(self, *given, **named):
        self._events.append("evaluate")
        return torch.tensor(1.0)

    def get_lr(self):
        return [0.001 * self.calls]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(losses, options)``: (events, log lines) of a run that has such losses."""
    monkeypatch.setattr(loop.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(loop.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(loop, "_agreed", lambda engine, mine: True)
    events, lines = [], []

    def say(line):
        if found := re.search(r"iteration +(\d+)", line):
            events.append(f"{'line' if 'elapsed' in line else 'evaluated'} {found[1]}")
        lines.append(line)

    monkeypatch.setattr(loop, "say", say)
    monkeypatch.setattr(loop.checkpoint, "save", lambda *given: events.append("save"))
    for name in READS:
        real = getattr(torch.Tensor, name)

        def read(tensor, *given, _real=real, **named):
            events.append("read")
            return _real(tensor, *given, **named)

        monkeypatch.setattr(torch.Tensor, name, read)

    def trained(losses, options="", save=False):
        found = settings(f"--train-iters {len(losses)} --log-interval 1 --lr-warmup-iters 1 {options}", 1, tmp_path)
        if save:
            found = dataclasses.replace(found, checkpoints=dataclasses.replace(found.checkpoints, save="somewhere"))
        training = loop.Training(found, Engine(events, losses), (None,) * 3, Position(), 1000, Signals(()))
        try:
            training.run()
        except RuntimeError:
            events.append("broken")
            training.say_rest()
        return events, lines

    return trained


def without_reads(events):
    return [event for event in events if event != "read"]


def test_a_line_is_said_when_the_next_iteration_was_started(run):
    events, lines = run([3.0, 2.5, 2.25])
    assert without_reads(events) == ["train 1", "train 2", "line 1", "train 3", "line 2", "line 3"]
    for number, (line, loss) in enumerate(zip(lines, [3.0, 2.5, 2.25], strict=True), start=1):
        assert f"iteration {number:8d}/       3 | consumed samples: {2 * number:12d}" in line
        assert f"lm loss: {loss:.6E}" in line
        assert f"learning rate: {0.001 * number:.6E}" in line


def test_nothing_is_read_before(run):
    events, _ = run([3.0, 2.5, 2.25])
    assert "read" in events
    assert events.index("train 2") == events.index("train 1") + 1


def test_an_interval_is_of_its_own_iterations(run):
    events, lines = run([3.0, 2.0, math.nan, 7.0, 1.0], "--log-interval 2")
    assert without_reads(events) == ["train 1", "train 2", "train 3", "line 2", "train 4", "train 5", "line 4"]
    assert "lm loss: 2.500000E+00" in lines[0]
    assert "number of nan iterations:   0" in lines[0]
    assert "lm loss: 7.000000E+00" in lines[1]
    assert "number of nan iterations:   1" in lines[1]


def test_lines_come_before_what_follows_their_iteration(run):
    options = "--eval-interval 2 --eval-iters 1 --save-interval 3"
    events, _ = run([3.0, 2.5, 2.0, 1.5], options, save=True)
    assert without_reads(events)[:10] == [
        "train 1", "train 2", "line 1", "line 2", "evaluate", "evaluated 2", "train 3", "line 3", "save", "train 4",
    ]  # fmt: skip
    assert without_reads(events)[10:12] == ["line 4", "save"]


def test_a_run_that_breaks_says_its_last_line(run):
    events, _ = run([3.0, 2.5, RuntimeError("a stage is gone")])
    assert without_reads(events) == ["train 1", "train 2", "line 1", "train 3", "broken", "line 2"]
