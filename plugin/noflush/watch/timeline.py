"""The timeline picture: what every stage did when, a row a stage, white where it waited."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from noflush.order.actions import Op
from noflush.watch.trace import Event

_COLOURS = {Op.FORWARD: "#4c78a8", Op.BACKWARD: "#59a14f", Op.UPDATE: "#e15759"}
_LABELS = {Op.FORWARD: "forward", Op.BACKWARD: "backward", Op.UPDATE: "update"}
_ACTIONS_DRAWN = 24
_NARROWEST_WITH_NUMBER = 50


def draw_timeline(runs: Sequence[tuple[str, Sequence[Event]]], path: str, window_s: float | None = None) -> None:
    """Draws the newest ``window_s`` seconds of each run, one above the other on one time scale, into ``path``.

    ``runs`` are (title, events). Needs matplotlib (the extra ``plot``); raises ValueError without it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a picture needs matplotlib: pip install 'noflush[plot]'") from error
    window = window_s or max(_span_of_newest(events) for _, events in runs)
    rows = sum(1 + max(e.stage for e in events) for _, events in runs)
    figure = Figure(figsize=(12, 0.9 + 0.8 * len(runs) + 0.38 * rows), layout="constrained")
    all_axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, events) in zip(all_axes, runs, strict=True):
        _draw_run(axes, title, events, window)
    all_axes[-1].set_xlabel("seconds")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _span_of_newest(events: Sequence[Event]) -> float:
    compute = [e for e in events if e.stage == 0 and e.op in (Op.FORWARD, Op.BACKWARD)]
    newest = compute[-_ACTIONS_DRAWN:]
    return newest[-1].end - newest[0].start


def _draw_run(axes, title: str, events: Sequence[Event], window: float) -> None:  # type: ignore[no-untyped-def]
    stages = sorted({e.stage for e in events})
    end = min(max(e.end for e in events if e.stage == s) for s in stages)
    start = end - window
    shown = [e for e in events if e.end > start and e.start < end and e.op in _COLOURS]
    widths = [e.end - e.start for e in shown if e.op is not Op.UPDATE]
    # Numbers on all bars or on none: those that happen to be wide would say nothing.
    numbered = bool(widths) and statistics.median(widths) > window / _NARROWEST_WITH_NUMBER
    for op, colour in _COLOURS.items():
        for stage in stages:
            bars = [(e.start - start, e.end - e.start) for e in shown if e.stage == stage and e.op is op]
            label = _LABELS[op] if stage == stages[0] else None
            axes.broken_barh(bars, (stage - 0.42, 0.84), color=colour, linewidth=0.3, edgecolor="white", label=label)
    for e in shown:
        if numbered and e.op is not Op.UPDATE:
            middle = (e.start + e.end) / 2 - start
            axes.text(
                middle, e.stage, str(e.index), ha="center", va="center", fontsize=6.5, color="white", clip_on=True
            )
    axes.set_yticks(stages, [f"stage {s}" for s in stages])
    axes.set_ylim(len(stages) - 0.5, -0.5)
    axes.set_xlim(0, window)
    axes.set_title(title, fontsize=10, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
