"""The block's ``replicas`` part: groups of pipelines that average their weights. Pure."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from noflush.block_errors import faults_of_error
from noflush.order.averaging import Drift


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class ReplicasConfig:
    """``async_pipeline.replicas``. Frozen."""

    lighthouse: str
    """``host:port`` of torchft's lighthouse, where groups meet; ``$VARIABLE`` is read from the environment."""

    mode: Literal["async", "sync"] = "async"
    """``async`` averages weights in the background. ``sync``, its twin: every update waits for all groups and is made
    of their mean gradients, as data parallelism does."""

    average_every: int = 20
    """Updates (1 to 100000) from one round's start to the next one's, if it has ended by then."""

    fraction: float = 0.05
    """Of a stage's weights, what one round averages: a slice, every slice in turn. Above 0, at most 1."""

    drift: Drift = "corrected"
    """``corrected``: an average is moved by what this group's weights move in the meantime, by their moving average.
    ``none``: by what they have moved."""

    min_groups: int = 1
    """With fewer groups (1 to 1000) nothing is averaged; each goes on alone."""

    bind: str = "127.0.0.1"
    """This host's address, at which other groups reach it. ``auto``: the one that its own name has; ``$VARIABLE`` is
    read from the environment."""

    timeout_s: float = 60.0
    """Seconds (1 to 3600) after which a round is given up, and a peer that is silent is taken for gone."""

    reroute: bool = False
    """Whether, where a stage but the first dies, its pipeline's micro-batches go through the same stage of another
    group until it is back. Off, a stage takes its group with it. All groups must say the same."""

    name: str = ""
    """What the log calls this group; empty: its number in a SLURM array, else its process number."""

    @property
    def meeting_place(self) -> str:
        """``lighthouse``, as it is meant."""
        return os.path.expandvars(self.lighthouse).removeprefix("http://")


_RANGES = {"average_every": (1, 100_000), "min_groups": (1, 1000), "timeout_s": (1, 3600)}


def faults_of_replicas(values: dict[str, Any], where: str) -> list[str]:
    """What is wrong with the JSON object ``values``; ``where``: its key's full name."""
    try:
        config = ReplicasConfig(**values)
    except ValidationError as error:
        return faults_of_error(error, values, where, [field.name for field in fields(ReplicasConfig)])
    faults = [
        f"{where}.{name} is {getattr(config, name)}: it must be from {least} to {most}"
        for name, (least, most) in _RANGES.items()
        if not least <= getattr(config, name) <= most
    ]
    if not 0 < config.fraction <= 1:
        faults.append(f"{where}.fraction is {config.fraction}: it must be above 0, and at most 1 (all weights at once)")
    if config.reroute and config.mode == "sync":
        faults.append(
            f"{where}.reroute is true with mode 'sync': an update that waits for all groups cannot go on without a "
            "stage; use mode 'async'"
        )
    host, colon, port = config.meeting_place.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        faults.append(
            f"{where}.lighthouse is {config.meeting_place!r}: it must be host:port, of a running torchft_lighthouse"
        )
    return faults
