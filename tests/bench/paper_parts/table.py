"""The result: a row a contestant, and its validation loss along the training. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from noflush.compare.curves import loss_at
from noflush.compare.tables import duration
from tests.bench.paper_parts.contestants import Contestant
from tests.bench.paper_parts.progress import Progress, at_tenths

COLUMNS = (
    "contestant",
    "what",
    "lr",
    "iterations",
    "validation loss",
    "perplexity",
    "tokens/s",
    "bubble",
    "loss at equal time",
)
SHOWN = tuple(column for column in COLUMNS if column != "what")
"""On a screen, which is narrow."""


@dataclass(frozen=True)
class Row:
    """A contestant's training so far.

    Attributes:
        lr: None while trials run.
        reached: iteration of its newest checkpoint.
        failed: why it was set aside, if it was.
    """

    contestant: Contestant
    lr: float | None
    reached: int
    progress: Progress
    tuned_over: tuple[float, ...] = ()
    failed: str | None = None


def seconds_of(row: Row) -> dict[int, float]:
    """Seconds of training until each evaluation: iterations of the median length, since slices start anew."""
    if row.progress.ms is None:
        return {}
    return {iteration: iteration * row.progress.ms / 1e3 for iteration in sorted(row.progress.validation)}


def equal_seconds(rows: Sequence[Row]) -> float | None:
    """The time by which all rows have a loss: of the one that ends first; None while one has none."""
    ends = [max(seconds_of(row).values(), default=None) for row in rows]
    return None if not ends or None in ends else min(end for end in ends if end is not None)


def cells(row: Row, iterations: int, tokens: int, seconds: float | None) -> list[str]:
    """A text for each of `COLUMNS`; ``tokens`` of an iteration, ``seconds`` of equal time."""
    progress = row.progress
    last = max(progress.validation, default=None)
    loss = None if last is None else progress.validation[last]
    curve = [(at, progress.validation[iteration]) for iteration, at in seconds_of(row).items()]
    reached = f"{row.reached:,}" + ("" if row.reached >= iterations else f" of {iterations:,}")
    early = seconds is not None and bool(curve) and seconds < curve[0][0]
    return [
        row.contestant.name,
        row.contestant.says,
        "-" if row.lr is None else f"{row.lr:g}" + ("*" if row.tuned_over else ""),
        f"{reached}, failed" if row.failed else reached,
        "-" if loss is None else f"{loss:.4f}" + ("" if last == iterations else f" at {last:,}"),
        "-" if loss is None else f"{math.exp(min(loss, 20.0)):.2f}",
        "-" if progress.ms is None else f"{tokens / progress.ms * 1e3:,.0f}",
        "-" if progress.bubble is None else f"{progress.bubble:.1%}",
        "-" if seconds is None or not curve else "none yet" if early else f"{loss_at(curve, seconds):.4f}",
    ]


def along(row: Row, iterations: int) -> list[str]:
    """The validation loss at each tenth, the contestant's name before them."""
    found = at_tenths(row.progress.validation, iterations)
    return [row.contestant.name, *("-" if loss is None else f"{loss:.4f}" for loss in found)]


def notes(rows: Sequence[Row], iterations: int, seconds: float | None, place: str) -> list[str]:
    """How to read it, a line each."""
    lines = [
        f"{place}; batch, data, samples and evaluations are the same for all; validation loss in nats, on samples that "
        "change from one evaluation to the next",
        "tokens/s and bubble: medians over the log lines of training; evaluation, starts and checkpoints are not in "
        "them. Slices go on with what was in flight, but for weights 'latest', which drain; evaluations drain nothing",
    ]
    if seconds is not None:
        lines.append(
            f"equal time: {duration(seconds)} of training, when the first of these ended (or is, so far); between "
            f"evaluations on a straight line. A slower one is there in the middle of its schedule of {iterations:,}"
        )
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kinds.setdefault(_origin(row), []).append(row.contestant.name)
    lines += [f"learning rate of {', '.join(names)}: {said}" for said, names in kinds.items()]
    return lines + [f"{row.contestant.name} failed: {row.failed}" for row in rows if row.failed]


def _origin(row: Row) -> str:
    if row.tuned_over:
        edge = "; it is at their edge: try further ones" if row.lr in (row.tuned_over[0], row.tuned_over[-1]) else ""
        return f"best of {', '.join(f'{lr:g}' for lr in row.tuned_over)} (*), by a tenth of the training each{edge}"
    given = row.lr is not None and row.lr != row.contestant.lr
    return "given by --lr" if given else row.contestant.lr_is


def markdown(rows: Sequence[Row], iterations: int, tokens: int, place: str, about: Mapping[str, str]) -> str:
    """The whole as a document."""
    seconds = equal_seconds(rows)
    lines = [f"# {about['title']}", ""] + [f"- {key}: {value}" for key, value in about.items() if key != "title"] + [""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---|---" + "|---:" * (len(COLUMNS) - 2) + "|"]
    lines += ["| " + " | ".join(cells(row, iterations, tokens, seconds)) + " |" for row in rows]
    lines += ["", "Validation loss along the training, by tenths of the iterations:", ""]
    lines += ["| contestant | " + " | ".join(f"{tenth * 10} %" for tenth in range(1, 11)) + " |", "|---" * 11 + "|"]
    lines += ["| " + " | ".join(along(row, iterations)) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(rows, iterations, seconds, place))]) + "\n"
