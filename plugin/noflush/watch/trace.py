"""What each rank did when: the events of the actions, the measured bubble, and the files they are written to.

Recording an event costs about a microsecond and a fixed amount of memory: the newest events are kept, older
ones overwritten, in memory as in the file. Their times are the CPU's, so on an accelerator, which the CPU runs
ahead of, they show when work was issued; the bubble is measured by the device's own clock there (`device_time`).
"""

from __future__ import annotations

import json
import os
import statistics
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from noflush.order.actions import COMPUTE, Op

_OPS = tuple(Op)
_CODE = {op: code for code, op in enumerate(_OPS)}
_TYPICAL_OF = 50
_NAMES = {
    Op.RECV_HEADER: "wait for header",
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.UPDATE: "update",
    Op.SEND_ACTIVATION: "send activation",
    Op.RECV_ACTIVATION: "wait for activation",
    Op.SEND_GRAD: "send gradient",
    Op.RECV_GRAD: "wait for gradient",
}


Begun = tuple[int, Any]
"""When an action began: `time.perf_counter_ns`, and the device's mark of it."""


class DeviceClock(Protocol):
    """What measures a device's work: `device_time.DeviceTimes`."""

    def mark(self) -> Any:
        """Now, on the device's stream."""

    def add(self, op: Op | None, start: Any) -> None:
        """What was enqueued since ``start`` was ``op``, or a whole call."""

    def settle(self) -> list[tuple[Op | None, int]]:
        """(op, nanoseconds) of what is over."""


@dataclass(frozen=True)
class Event:
    """One action of one stage: its op, micro-batch (or update) number, start and end in seconds."""

    stage: int
    op: Op
    index: int
    start: float
    end: float


@dataclass(frozen=True)
class Trace:
    """What was read from a folder: all ranks' events by start time, and each stage's `train_batch` calls.

    ``calls[stage]`` are (start, end) in seconds; time between them is the user's (evaluation, checkpoints).
    """

    events: list[Event]
    calls: dict[int, list[tuple[float, float]]]


class Recorder:
    """Events of one rank, the newest ``capacity`` of them, and running sums for the bubble.

    Args:
        stage: this rank's pipeline stage.
        rank: global rank, names the file.
        folder: where `write` puts ``rank<k>.json``; None writes nothing.
        capacity: events kept, and a quarter as many calls.
        device: the device's clock, whose times the sums are then made of; None: the host's times are the compute's.
    """

    def __init__(
        self,
        stage: int,
        rank: int,
        folder: str | None = None,
        capacity: int = 5_000,
        device: DeviceClock | None = None,
    ) -> None:
        self.stage = stage
        self._device = device
        self._of_call: list[tuple[Op | None, int]] = []
        self._path = Path(folder) / f"rank{rank}.json" if folder else None
        self._rank = rank
        self._events: deque[tuple[int, int, int, int]] = deque(maxlen=capacity)
        self._calls: deque[tuple[int, int]] = deque(maxlen=capacity // 4)  # a call has three events or more
        self._busy_ns = [0] * len(_OPS)
        self._times = [0] * len(_OPS)
        self._spent_ns = 0
        self._taken_ns = (0, 0)
        self._newest = [deque[int](maxlen=_TYPICAL_OF) for _ in _OPS]
        # Ranks of one node share the monotonic clock; across nodes the wall clock lines them up.
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    def begin(self, op: Op | None) -> Begun:
        """An action begins, or a whole call (None): what `add` and `add_call` take."""
        marked = self._device.mark() if self._device is not None and (op is None or op in COMPUTE) else None
        return time.perf_counter_ns(), marked

    def end(self, op: Op, index: int, begun: Begun, waited_ns: int = 0) -> None:
        """Records the action that began as ``begun``, as so much later begun as it ``waited_ns`` for other ranks."""
        start_ns, marked = begun
        if marked is not None:
            assert self._device is not None
            self._device.add(op, marked)
        self.add(op, index, start_ns + waited_ns, time.perf_counter_ns())

    def end_call(self, begun: Begun) -> None:
        """Records the whole `train_batch` call that began as ``begun``."""
        start_ns, marked = begun
        if marked is not None:
            assert self._device is not None
            self._device.add(None, marked)
        self.add_call(start_ns, time.perf_counter_ns())

    def add(self, op: Op, index: int, start_ns: int, end_ns: int) -> None:
        """Records an action that ran from ``start_ns`` to ``end_ns`` (`time.perf_counter_ns`)."""
        code = _CODE[op]
        self._events.append((code, index, start_ns, end_ns))
        if self._device is None or op not in COMPUTE:
            self._busy_ns[code] += end_ns - start_ns
            self._times[code] += 1
            self._newest[code].append(end_ns - start_ns)

    def add_call(self, start_ns: int, end_ns: int) -> None:
        """Records one whole `train_batch` call, against whose time the bubble is measured."""
        self._calls.append((start_ns, end_ns))
        if self._device is None:
            self._spent_ns += end_ns - start_ns

    def _settle(self) -> None:
        for op, ns in self._device.settle() if self._device is not None else ():
            self._of_call.append((op, ns))
            if op is None:  # what a call did counts when the call is over, against its own time
                for done, spent in self._of_call[:-1]:
                    assert done is not None
                    self._busy_ns[_CODE[done]] += spent
                    self._times[_CODE[done]] += 1
                    self._newest[_CODE[done]].append(spent)
                self._spent_ns += ns
                self._of_call.clear()

    def typical(self, op: Op) -> float:
        """Seconds of an action of this kind, the median of the newest; 0 before any. Compute by the device's clock."""
        self._settle()
        newest = self._newest[_CODE[op]]
        return statistics.median(newest) / 1e9 if newest else 0.0

    def totals(self) -> tuple[int, int]:
        """Nanoseconds of compute, and nanoseconds in `train_batch`, since the run began."""
        self._settle()
        busy = sum(ns for op, ns in zip(_OPS, self._busy_ns, strict=True) if op in COMPUTE)
        return self._taken_ns[0] + busy, self._taken_ns[1] + self._spent_ns

    @contextmanager
    def outside_calls(self) -> Iterator[None]:
        """What is recorded within is no call's, as a drain is not: kept as events, left out of the interval's sums."""
        self._settle()
        busy, times, device = list(self._busy_ns), list(self._times), self._device
        self._device = None
        yield
        self._busy_ns, self._times, self._device = busy, times, device

    def take_interval(self) -> dict[str, float]:
        """Sums since the last take: ``seconds``, ``bubble`` (share of them without compute), ms an action by name.

        On an accelerator of what the device has finished, which is a call or two less.
        """
        self._settle()
        busy = sum(ns for op, ns in zip(_OPS, self._busy_ns, strict=True) if op in COMPUTE)
        summary = {
            "seconds": self._spent_ns / 1e9,
            "bubble": 1.0 - busy / self._spent_ns if self._spent_ns else float("nan"),
        }
        for op, ns, times in zip(_OPS, self._busy_ns, self._times, strict=True):
            if times:
                summary[_NAMES[op]] = ns / times / 1e6
        self._taken_ns = self.totals()
        self._busy_ns = [0] * len(_OPS)
        self._times = [0] * len(_OPS)
        self._spent_ns = 0
        return summary

    def events(self) -> list[Event]:
        """The kept events, oldest first; seconds since the Unix epoch."""
        return [
            Event(self.stage, _OPS[code], int(index), (start + self._epoch_ns) / 1e9, (end + self._epoch_ns) / 1e9)
            for code, index, start, end in self._events
        ]

    def write(self) -> None:
        """Writes (over) this rank's file; it is never seen half-written."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = [[e.op.value, e.index, e.start, e.end] for e in self.events()]
        calls = [[(a + self._epoch_ns) / 1e9, (b + self._epoch_ns) / 1e9] for a, b in self._calls]
        scratch = self._path.with_suffix(".partial")
        scratch.write_text(json.dumps({"rank": self._rank, "stage": self.stage, "events": rows, "calls": calls}))
        os.replace(scratch, self._path)


def read(folder: str | Path) -> Trace:
    """The traces of every ``rank<k>.json`` in ``folder``.

    Raises ValueError if there is none or one cannot be read.
    """
    files = sorted(Path(folder).glob("rank*.json"))
    if not files:
        raise ValueError(f"no rank*.json in {folder}: set async_pipeline.trace_dir and train, then point here")
    events: list[Event] = []
    calls: dict[int, list[tuple[float, float]]] = {}
    for file in files:
        try:
            data = json.loads(file.read_text())
            stage = int(data["stage"])
            events += [Event(stage, Op(op), int(i), start, end) for op, i, start, end in data["events"]]
            calls[stage] = [(start, end) for start, end in data["calls"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a noflush trace ({error}); remove it or trace again") from error
    return Trace(sorted(events, key=lambda event: event.start), calls)


def to_chrome(events: Iterable[Event]) -> dict[str, Any]:
    """The events in Chrome's trace format (open in Perfetto or chrome://tracing); a row a stage."""
    rows: list[dict[str, Any]] = []
    stages = set()
    for e in events:
        stages.add(e.stage)
        rows.append(
            {
                "name": f"{e.op.value}{e.index}",
                "cat": _NAMES[e.op],
                "ph": "X",
                "ts": e.start * 1e6,
                "dur": (e.end - e.start) * 1e6,
                "pid": 0,
                "tid": e.stage,
            }
        )
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": s, "args": {"name": f"stage {s}"}} for s in sorted(stages)
    ]
    return {"traceEvents": names + rows, "displayTimeUnit": "ms"}


def bubble(trace: Trace) -> dict[int, float]:
    """By stage, the share of the time inside `train_batch` calls that went without compute.

    Taken where every stage has kept events; a drain's backwards, outside any call, do not count.
    """
    stages = sorted(trace.calls)
    # Every stage keeps as many events, not as much time: compare them where all have some.
    since = max(min((e.start for e in trace.events if e.stage == s), default=0.0) for s in stages)
    shares = {}
    for stage in stages:
        calls = [(start, end) for start, end in trace.calls[stage] if start >= since]
        spent = sum(end - start for start, end in calls)
        starts = [start for start, _ in calls]
        busy = 0.0
        for e in trace.events:
            if e.stage == stage and e.op in COMPUTE:
                at = bisect_right(starts, e.start) - 1
                if at >= 0 and e.end <= calls[at][1]:
                    busy += e.end - e.start
        shares[stage] = 1.0 - busy / spent if spent else float("nan")
    return shares
