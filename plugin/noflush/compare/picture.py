"""``compare.png``: loss against tokens above, against time below, a column a P."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noflush.compare.result import Panel, Points, Row

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf", "#bcbd22")


def require() -> None:
    """Raises ValueError if there is no matplotlib to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('the picture needs matplotlib: pip install "noflush[plot]", or give --no-picture')


@dataclass(frozen=True)
class _Line:
    """A row's curve: ``short`` for one that ends in a run of its own length, ``broken`` if a seed diverged."""

    row: Row
    points: Points
    colour: str
    short: bool
    broken: bool


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draws ``panels`` into ``path``: dashed synchronous, solid asynchronous, in the colour of its synchronous row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(panels) + 1.8, 8), layout="constrained", dpi=130)
    grid: Any = figure.subplots(2, len(panels), squeeze=False)
    colours = _colours(panels[0].rows)
    for column, panel in enumerate(panels):
        lines = [(row, colours[row.contestant.name]) for row in panel.rows]
        by_tokens = [_line(row, row.curve, colour, False) for row, colour in lines]
        by_time = [_line(row, row.equal_time.curve, colour, row.equal_time.read_from != "all") for row, colour in lines]
        many, unit = (1e6, "millions") if by_tokens[0].points[-1][0] >= 1e6 else (1e3, "thousands")
        _draw_lines(grid[0][column], by_tokens, many, f"tokens ({unit})")
        seconds, unit = (1.0, "s") if panel.seconds < 90 else (60.0, "min") if panel.seconds < 5400 else (3600.0, "h")
        _draw_lines(grid[1][column], by_time, seconds, f"time of a pipeline ({unit})")
        grid[0][column].set_title(f"P = {panel.stages}, equal tokens")
        grid[1][column].set_title(f"P = {panel.stages}, equal time")
    for axes in grid[:, 0]:
        axes.set_ylabel("validation loss (nats)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    legend = "dashed: with the flush\ndot: a run of that length\nx: a seed diverged\n▲: ends above"
    figure.legend(handles, labels, loc="outside right upper", frameon=False, title=legend)
    figure.savefig(path)


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """By name: a colour each, but a synchronous row's goes to the first that came with it too."""
    colours: dict[str, str] = {}
    fresh = iter(_COLOURS * (1 + len(rows) // len(_COLOURS)))
    single: dict[str, str] = {}
    for row in rows:
        name, twin = row.contestant.name, row.contestant.twin
        if twin in single:
            colours[name] = single.pop(twin)
            continue
        colours[name] = next(fresh)
        if row.contestant.synchronous:
            single[name] = colours[name]
    return colours


def _line(row: Row, points: Points, colour: str, short: bool) -> _Line:
    finite = [(x, loss) for x, loss in points if math.isfinite(loss)]
    return _Line(row, finite, colour, short, broken=len(finite) < len(points))


def _draw_lines(axes: Any, lines: Sequence[_Line], unit: float, label: str) -> None:
    bottom, top = _limits([[loss for _, loss in line.points] for line in lines if not line.broken])
    for line in lines:
        one = line.row.contestant
        x, y = [at / unit for at, _ in line.points], [loss for _, loss in line.points]
        axes.plot(x, y, color=line.colour, ls="--" if one.synchronous else "-", lw=1.6, label=one.name)
        mark = "x" if line.broken else "^" if y[-1] > top else "o" if line.short else ""
        if mark:
            axes.plot(x[-1], min(y[-1], top), mark, color=line.colour, ms=6, mew=2 if mark == "x" else 1, clip_on=False)
    axes.set_ylim(bottom, top)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _limits(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Cuts off the fall from knowing nothing, and rows far behind the others, which would flatten all differences."""
    if not curves:
        return 0.0, 10.0
    ends = [curve[-1] for curve in curves]
    low, start = min(ends), max(curve[0] for curve in curves)
    height = max(0.3 * (start - low), 2 * (statistics.median(ends) - low), 0.01)
    return low - 0.08 * height, low + height
