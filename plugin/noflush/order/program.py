"""A program: what every stage does, cut into calls; and a picture of it for errors. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from noflush.order.actions import COMPUTE, Action

Program = Sequence[Sequence[Sequence[Action]]]
"""``program[call][stage]`` is a list of actions."""

_STAGES_DRAWN, _CALLS_DRAWN, _ACTIONS_DRAWN = 4, 2, 24
"""To either side of the bad action: of a large pipeline the rest would hide it."""


class ScheduleError(ValueError):
    """An order of actions that would deadlock, lose a micro-batch or use a wrong weight version."""


def draw(order: Program, call: int | None = None, stage: int | None = None, position: int | None = None) -> str:
    """The grid of compute actions, a row a stage and a column a call, the bad action between ``>>`` and ``<<``.

    Where a bad action is named, the stages, calls and actions around it.
    """
    stages = _around(len(order[0]), stage, _STAGES_DRAWN)
    calls = _around(len(order), call, _CALLS_DRAWN)

    def cell(t: int, s: int) -> str:
        words: list[str] = []
        bad_at = 0
        for i, action in enumerate(order[t][s]):
            if (t, s, i) == (call, stage, position):
                bad_at = len(words)
                words.append(f">>{action}<<")
            elif action.op in COMPUTE:
                words.append(f"{action.op.value}{action.index}")
        shown = _around(len(words), bad_at, _ACTIONS_DRAWN)
        left, right = "... " * (shown.start > 0), " ..." * (shown.stop < len(words))
        return left + " ".join(words[shown.start : shown.stop]) + right

    cells = [[cell(t, s) for t in calls] for s in stages]
    width = [max(len(row[i]) for row in cells) for i in range(len(calls))]
    lines = [
        f"stage {s:<3}| " + " | ".join(text.ljust(width[i]) for i, text in enumerate(row))
        for s, row in zip(stages, cells, strict=True)
    ]
    if len(calls) < len(order):
        lines.insert(0, f"calls {calls.start} to {calls.stop - 1} of {len(order)}:")
    return "\n".join(lines)


def _around(count: int, middle: int | None, reach: int) -> range:
    """The numbers below ``count`` within ``reach`` of ``middle``; all of them where there is none."""
    return range(count) if middle is None else range(max(0, middle - reach), min(count, middle + reach + 1))
