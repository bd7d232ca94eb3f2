"""A comparison's tables, in words: the same cells for the screen and for Markdown. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from noflush.compare.noise import Spread
from noflush.compare.result import Against, Panel, Row
from noflush.compare.settings import Task

COLUMNS = (
    "contestant",
    "lr",
    "loss at equal tokens",
    "to sync AdamW (SE)",
    "to best sync (SE)",
    "token tax",
    "sync there at",
    "loss at equal time",
    "update cost",
)


def cells(row: Row) -> list[str]:
    """One row's, a text for each of `COLUMNS`."""
    mark = {"own run": "", "long curve": " (curve)", "all": ""}[row.equal_time.read_from]
    return [
        row.contestant.name,
        f"{row.lr:g}" + ("*" if row.lr_at_edge else ""),
        _loss(row.loss, len(row.losses)),
        _difference(row.adamw, row.contestant.name),
        _difference(row.best, row.contestant.name),
        _share(row.adamw.tax, row, "not reached"),
        _share(row.adamw.matched_at, row, "never"),
        _loss(row.equal_time.loss, len(row.losses)) + mark,
        f"{row.update_cost:.0%} of {row.pass_ms:.2g} ms",
    ]


def _loss(loss: Spread, seeds: int) -> str:
    if loss.diverged:
        return f"diverged ({loss.diverged} of {seeds})"
    if not math.isfinite(loss.mean):
        return "diverged"
    return f"{loss.mean:.3f}" + ("" if loss.deviation is None else f" ± {loss.deviation:.3f}")


def _difference(against: Against, name: str) -> str:
    if against.name == name or against.difference is None:
        return "-"
    errors = against.difference.errors
    return f"{against.difference.nats:+.3f}" + ("" if errors is None else f" ({abs(errors):.1f})")


def _share(share: float | None, row: Row, none: str) -> str:
    if row.adamw.name == row.contestant.name or row.loss.diverged:
        return "-"
    return none if share is None else f"{share:.2f}"


def title(panel: Panel, task: Task) -> str:
    """What a table is of."""
    return f"P = {panel.stages}, K = {task.gas}"


def time_line(panel: Panel, stage_ms: float) -> str:
    """What equal time means there."""
    return (
        f"All tokens take {duration(panel.seconds)} without the flush and {duration(panel.seconds_of_flush)} with it, "
        f"at {stage_ms:g} ms of forward and backward a stage and micro-batch."
    )


def duration(seconds: float) -> str:
    """Such as 45 s, 3.5 min, 2.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def notes(panels: Sequence[Panel]) -> list[str]:
    """How to read them, a line each."""
    rows = [row for panel in panels for row in panel.rows]
    lines = [
        f"best synchronous AdamW: {_names(panels, [panel.rows[0].adamw.name for panel in panels])}; "
        f"best synchronous row of all: {_names(panels, [panel.rows[0].best.name for panel in panels])}",
        "loss: nats on held-out text that no search saw, mean ± standard deviation over seeds; SE: standard errors of "
        "the difference over seeds, which are paired",
        "token tax: share of all tokens after which the row's mean curve is down to synchronous AdamW's final loss; "
        "sync there at: share after which synchronous AdamW's curve was down to this row's",
        "loss at equal time: when a pipeline without the flush has seen all tokens; synchronous rows by then have seen "
        "fewer, and are runs of that length with a schedule of their own at the learning rate found for all tokens"
        + (
            "; (curve): read from the long run's, which is not annealed there"
            if any(row.equal_time.read_from == "long curve" for row in rows)
            else ""
        ),
        "update cost: optimizer steps of an update, parameter by parameter, against forward and backward of its batch, "
        "on this machine in one thread",
    ]
    if any(row.lr_at_edge for row in rows):
        lines.append("*: the smallest or the largest rate that was tried")
    for row in rows:
        if row.skipped:
            lines.append(f"{row.contestant.name}: {row.skipped} updates skipped, as gradients were not finite")
    return lines


def _names(panels: Sequence[Panel], names: list[str]) -> str:
    if len(set(names)) == 1:
        return names[0]
    return ", ".join(f"{name} (P = {panel.stages})" for name, panel in zip(names, panels, strict=True))


def markdown(panels: Sequence[Panel], task: Task, about: Sequence[str], stage_ms: float) -> str:
    """The whole as a document."""
    lines = ["# Update rules under delay", "", *(f"- {line}" for line in about), ""]
    for panel in panels:
        lines += [f"## {title(panel, task)}", "", time_line(panel, stage_ms), ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in panel.rows] + [""]
    lines += [f"- {line}" for line in notes(panels)]
    lines += ["", "| contestant | rule | optimizer | parameters | schedule, weights |", "|---|---|---|---|---|"]
    for row in panels[0].rows:
        one = row.contestant
        params = ", ".join(f"{name} {value}" for name, value in one.params.items()) or "defaults"
        how = one.schedule if one.synchronous else f"{one.schedule}, {one.weights}"
        lines.append(f"| {one.name} | {one.says} | {one.optimizer} | {params} | {how} |")
    return "\n".join(lines) + "\n"
