"""When a run ends before its last iteration: a signal, a duration, or an iteration to exit at."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from noflush.launch.arguments.settings import Steps
from noflush.launch.signals import Signals


class Stop:
    """One rank's.

    Args:
        steps: ``exit_signals``, ``exit_after_minutes`` and ``exit_every``.
        signals: what is listened to.
        engine: tells all ranks at the same call, if it is noflush's; with another, ranks ask each other.
    """

    def __init__(self, steps: Steps, signals: Signals, engine: Any) -> None:
        self._steps = steps
        self._engine = engine
        self._start = time.monotonic()
        self._asked: str | None = None
        signals.then(lambda: self._ask(str(signals.first)))

    def _ask(self, reason: str) -> None:
        self._asked = self._asked or reason
        if hasattr(self._engine, "request_stop"):
            self._engine.request_stop()

    def reason(self, iteration: int) -> str | None:
        """Why the run is to end after ``iteration``, the same on all ranks but for the words; None to go on."""
        minutes = self._steps.exit_after_minutes
        if minutes is not None and self._asked is None and time.monotonic() - self._start > 60 * minutes:
            self._ask(f"after {minutes:g} minutes")
        if self._steps.exit_every and iteration % self._steps.exit_every == 0:
            return f"at iteration {iteration}"
        if self._told():
            return self._asked or "asked by another rank"
        return None

    def _told(self) -> bool:
        if hasattr(self._engine, "stop_requested"):
            return bool(self._engine.stop_requested)
        if not self._steps.exit_signals and self._steps.exit_after_minutes is None:
            return False
        asked = torch.tensor([float(self._asked is not None)], device=self._engine.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())
