"""``compare.png``: loss against tokens above, against time below, a column a P."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from noflush.compare.result import Panel, Points, Row

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf", "#bcbd22")


def require() -> None:
    """Raises ValueError if there is no matplotlib to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('the picture needs matplotlib: pip install "noflush[plot]", or give --no-picture')


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draws ``panels`` into ``path``: dashed synchronous, solid asynchronous, one colour an optimizer's pair."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(panels) + 1.8, 8), layout="constrained", dpi=130)
    grid: Any = figure.subplots(2, len(panels), squeeze=False)
    colours = _colours(panels[0])
    for column, panel in enumerate(panels):
        unit, seconds = ("s", 1) if panel.seconds < 90 else ("min", 60) if panel.seconds < 5400 else ("h", 3600)
        by_tokens, by_time = grid[0][column], grid[1][column]
        many, tokens_unit = (1e6, "millions") if panel.rows[0].curve[-1][0] >= 1e6 else (1e3, "thousands")
        for row in panel.rows:
            one = row.contestant
            style = {"color": colours[one.name], "ls": "--" if one.synchronous else "-", "lw": 1.6, "label": one.name}
            _plot(by_tokens, [(tokens / many, loss) for tokens, loss in row.curve], style)
            timed = [(at / seconds, loss) for at, loss in row.equal_time.curve]
            _plot(by_time, timed, style)
            _mark_divergence(by_tokens, row, many, colours[one.name])
            if row.equal_time.read_from != "all" and math.isfinite(timed[-1][1]):
                by_time.plot(*timed[-1], "o", color=colours[one.name], ms=5)
        by_tokens.set(title=f"P = {panel.stages}", xlabel=f"tokens ({tokens_unit})")
        by_time.set(xlabel=f"time of a pipeline ({unit})")
        for axes, ends in (
            (by_tokens, [row.curve for row in panel.rows]),
            (by_time, [row.equal_time.curve for row in panel.rows]),
        ):
            _limits(axes, ends)
            axes.set_ylabel("validation loss (nats)" if column == 0 else "")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right upper", frameon=False, title="dashed: with the flush\nx: a seed diverges"
    )
    figure.savefig(path)


def _colours(panel: Panel) -> dict[str, str]:
    """A colour a synchronous row, which its asynchronous ones of the same optimizer do not repeat but the first."""
    colours: dict[str, str] = {}
    fresh = iter(_COLOURS * (1 + len(panel.rows) // len(_COLOURS)))
    of_twin: dict[str, str] = {}
    for row in panel.rows:
        one = row.contestant
        twin = one.name if one.synchronous else one.twin
        if twin is not None and not one.synchronous and twin in of_twin:
            colours[one.name] = of_twin.pop(twin)
        else:
            colours[one.name] = next(fresh)
            if one.synchronous:
                of_twin[one.name] = colours[one.name]
    return colours


def _plot(axes: Any, points: Points, style: dict[str, Any]) -> None:
    kept = [(x, y) for x, y in points if math.isfinite(y)]
    axes.plot([x for x, _ in kept], [y for _, y in kept], **style)


def _mark_divergence(axes: Any, row: Row, many: float, colour: str) -> None:
    kept = [(tokens / many, loss) for tokens, loss in row.curve if math.isfinite(loss)]
    if row.loss.diverged:
        axes.plot(*kept[-1], "x", color=colour, ms=8, mew=2)


def _limits(axes: Any, curves: Sequence[Points]) -> None:
    """Cuts off the fall from knowing nothing, which would flatten all differences."""
    finite = [[loss for _, loss in curve if math.isfinite(loss)] for curve in curves]
    ends = [losses[-1] for losses in finite]
    low, high = min(ends), max(ends)
    starts = max(losses[0] for losses in finite)
    axes.set_ylim(low - 0.05 * (starts - low), min(starts, max(high + 0.3 * (high - low), low + 0.3 * (starts - low))))
    axes.set_xlim(left=0)
