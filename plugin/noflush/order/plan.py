"""What a run will need and give, before anything is started: delay, versions, memory and utilisation by stage.

Pure. ``python -m noflush plan`` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from noflush.order.communicators import communicators
from noflush.order.schedule import Schedule
from noflush.order.timing import Cost, Link, play


@dataclass(frozen=True)
class StagePlan:
    """One stage's row.

    Attributes:
        stage: 0 is the input.
        delay: largest delay of its gradients once the pipeline is full, in updates.
        mean_delay: the same averaged over a batch.
        lag: micro-batches in flight between calls.
        versions: weight versions alive at once, the newest included.
        in_flight: micro-batches whose activations are held at once.
        parameters: of this stage, if given.
        stash_bytes: bytes of the versions beyond the newest, if the parameters are given.
        loss_lag: calls after which this stage learns a batch's loss.
        communicators: of NCCL that a rank of it opens on a GPU.
        communicator_bytes: what they hold there, besides all else; an estimate.
    """

    stage: int
    delay: int
    mean_delay: float
    lag: int
    versions: int
    in_flight: int
    parameters: int | None
    stash_bytes: int | None
    loss_lag: int
    communicators: int
    communicator_bytes: int


@dataclass(frozen=True)
class Plan:
    """Every stage's row, and the share of time spent computing with and without the flush."""

    schedule: Schedule
    stages: tuple[StagePlan, ...]
    no_flush: float
    flush: float

    def to_json(self) -> dict[str, Any]:
        """``{"stages": [{"stage": 0, "delay": 7, ...}, ...], "utilisation": {"no_flush": .., "flush": ..}, ...}``."""
        return {
            "schedule": asdict(self.schedule),
            "stages": [asdict(stage) for stage in self.stages],
            "utilisation": {"no_flush": self.no_flush, "flush": self.flush},
            "speed_up": self.no_flush / self.flush,
        }


def make_plan(
    schedule: Schedule,
    parameters: Sequence[int] | None = None,
    bytes_per_parameter: int = 4,
    cost: Cost | None = None,
    links: float | Sequence[Link] = 0.0,
    data: int = 1,
    tensor: int = 1,
) -> Plan:
    """The plan of ``schedule``.

    Args:
        parameters: trainable parameters of each stage; None leaves memory out.
        bytes_per_parameter: of one stashed weight.
        cost: forward and backward of one micro-batch at every stage, seconds; 1 and 2 by default, so that
            ``links`` are then in units of a forward.
        links: as `timing.play` takes them.
        data, tensor: replicas, and slices of every stage.

    Raises:
        ValueError: not one parameter count a stage.
    """
    if parameters is not None and len(parameters) != schedule.stages:
        raise ValueError(f"{len(parameters)} parameter counts for {schedule.stages} stages: give one for each")
    costs = [cost or Cost(1.0, 2.0)] * schedule.stages
    rows = []
    for s in range(schedule.stages):
        count = parameters[s] if parameters is not None else None
        versions = schedule.versions_alive(s)
        opened = communicators(s, schedule.stages, data, tensor)
        rows.append(
            StagePlan(
                stage=s,
                delay=schedule.max_delay(s),
                mean_delay=schedule.mean_delay(s),
                lag=schedule.lag(s),
                versions=versions,
                in_flight=schedule.in_flight(s),
                parameters=count,
                stash_bytes=None if count is None else count * bytes_per_parameter * (versions - 1),
                loss_lag=schedule.loss_lag(s),
                communicators=opened.count,
                communicator_bytes=opened.bytes_estimate,
            )
        )
    flush = Schedule(schedule.stages, schedule.gas, "1f1b_flush")
    return Plan(
        schedule,
        tuple(rows),
        no_flush=min(play(schedule, costs, links).utilisation),
        flush=min(play(flush, costs, links).utilisation),
    )


def communicator_line(plan: Plan) -> str:
    """How many communicators a rank opens, in words: stages that open as many are told together."""
    kinds: dict[tuple[int, int], list[int]] = {}
    for row in plan.stages:
        kinds.setdefault((row.communicators, row.communicator_bytes), []).append(row.stage)
    parts = [
        f"{count} at stage{'s' * (len(stages) > 1)} {_ranges(stages)} (about {human_bytes(size)})"
        for (count, size), stages in kinds.items()
    ]
    return (
        f"communicators that a rank opens on GPUs: {', '.join(parts)}; their memory is NCCL's and comes on top, "
        "estimated by its default buffers: make bench-gpu measures it, NCCL_BUFFSIZE and NCCL_MAX_CTAS lower it"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> '0-2, 5'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def human_bytes(count: int) -> str:
    """1536 -> '1.5 KiB'."""
    if count < 1024:
        return f"{count} B"
    power = min(4, int(math.log(count, 1024)))
    return f"{count / 1024**power:.1f} {['', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"
