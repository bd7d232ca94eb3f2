"""What the launcher's log says of a training: losses, times, bubble. Pure."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

_ITERATION = re.compile(
    r"iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+) .*lm loss: (\S+) .*?(?:bubble: ([\d.]+)% .*)?\|$"
)
_VALIDATION = re.compile(r"validation loss at iteration (\d+) \| lm loss value: (\S+) .*\|$")


@dataclass
class Progress:
    """What was read.

    Attributes:
        validation: loss in nats by iteration, of the newest time that it was evaluated there.
        ms, bubble: of an iteration, medians over all lines but a slice's first, which starts; None before any.
        iteration, loss: of the newest line of training.
    """

    validation: dict[int, float] = field(default_factory=dict)
    ms: float | None = None
    bubble: float | None = None
    iteration: int = 0
    loss: float = math.nan


def read(logs: Sequence[str]) -> Progress:
    """Of the logs of all slices so far, in order. What a killed slice had begun to write is passed over."""
    found, ms, bubbles = Progress(), [], []
    for log in logs:
        first = True
        for line in log.splitlines():
            if match := _ITERATION.search(line.rstrip()):
                found.iteration, found.loss = int(match[1]), float(match[3])
                if not first:
                    ms.append(float(match[2]))
                    bubbles += [float(match[4]) / 100] if match[4] else []
                first = False
            elif match := _VALIDATION.search(line.rstrip()):
                found.validation[int(match[1])] = float(match[2])
    found.ms = statistics.median(ms) if ms else None
    found.bubble = statistics.median(bubbles) if bubbles else None
    return found


def at_tenths(validation: dict[int, float], iterations: int) -> list[float | None]:
    """The validation loss at a tenth, two tenths, ... of the training; None where it is not there yet."""
    return [validation.get(iterations * tenth // 10) for tenth in range(1, 11)]
