"""sweep.png: every run's curves over tokens, and below them a panel for each swept option (panels.py)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.components.run_record import lower_is_better
from torchtitan.sweep.panels import (
    BEST,
    MARKS,
    NAMED,
    differing_keys,
    draw_panel,
    fitting_columns,
    label_of,
    legend_rows,
    lines_of,
    set_y_axis,
    swept_axes,
)
from torchtitan.sweep.results import LOSS, Result, Results

PICTURE = "sweep.png"
ACROSS = 3  # panels of swept options in a row
WIDTH, HEIGHT, LINE = 15.0, 4.4, 0.23  # inches: of the picture, of a row of panels, of a line of text


def draw(results: Results, folder: Path) -> Path:
    """Draw the runs that have figures, at least one. Returns the picture's path."""
    import matplotlib  # 0.5 s, and only a sweep's end needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [run for run in results.runs if run.record.history]
    colours, names = _colours(results, drawn, matplotlib), _names(results, drawn)
    axes = swept_axes(results, drawn)
    lines = [lines_of(results, drawn, axis) for axis in axes]
    across = min(ACROSS, len(axes))
    rows = math.ceil(len(axes) / across)
    # Above a panel stand its lines, below it the values of the axis and their names.
    most = max(
        2 * len(axis) + legend_rows(axis, each, WIDTH / across)
        for axis, each in zip(axes, lines, strict=True)
    )
    top_height = HEIGHT + LINE * math.ceil(len(names) / fitting_columns(names.values(), WIDTH))
    heights = [top_height, 2 * LINE + rows * (HEIGHT + LINE * most)]
    figure = pyplot.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=heights)
    top, below = halves
    figures = list(dict.fromkeys([LOSS, results.metric]))
    for panel, key in zip(np.atleast_1d(top.subplots(1, len(figures))), figures, strict=True):
        _over_tokens(panel, results, drawn, key, colours)
    _legend(top, names, colours)
    below.suptitle(f"{results.metric}:  {MARKS}")
    panels = below.subplots(rows, across, squeeze=False).flat
    for panel, axis, each in zip(panels, axes, lines, strict=False):
        draw_panel(panel, results, axis, each, colours, WIDTH / across)
    for left_over in list(below.axes)[len(axes) :]:
        left_over.remove()
    path = folder / PICTURE
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _colours(results: Results, drawn: Sequence[Result], matplotlib: Any) -> dict[str, Any]:
    """Run -> colour: one of ten, or by its rank where there are more runs."""
    if len(drawn) <= NAMED:
        return {run.member.name: f"C{place}" for place, run in enumerate(drawn)}
    last = {run.member.name: run.record.last(results.metric) for run in drawn}
    known = sorted(
        (value for value in last.values() if value is not None and math.isfinite(value)),
        reverse=not lower_is_better(results.metric),
    )
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, max(2, len(known))))
    return {
        name: shades[known.index(value)] if value in known else "lightgrey" for name, value in last.items()
    }


def _names(results: Results, drawn: Sequence[Result]) -> dict[str, str]:
    """Run -> its text in the legend: all runs where there are few, else the best."""
    named = drawn if len(drawn) <= NAMED else [run for run in drawn if run is results.best]
    keys = differing_keys(results.axes, drawn)
    names = {}
    for run in named:
        name = label_of(run, keys, results) or run.member.name
        name += "  (best)" if run is results.best else ""
        names[run.member.name] = (
            name if named is drawn else f"{name}; the others from the best (dark) to the worst"
        )
    return names


def _legend(top: Any, names: dict[str, str], colours: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    if names:
        handles = [Line2D([], [], color=colours[name], linewidth=3) for name in names]
        columns = fitting_columns(names.values(), WIDTH)
        top.legend(handles, names.values(), loc="outside lower center", ncols=columns, frameon=False)


def _over_tokens(
    panel: Any, results: Results, drawn: Sequence[Result], key: str, colours: dict[str, Any]
) -> None:
    from matplotlib.ticker import EngFormatter

    axis_named = "steps"
    for run in drawn:
        steps, values = run.record.values(key)
        tokens = run.record.on_axis(steps, "tokens")
        axis_named = "steps" if tokens is None else "tokens"
        at = steps if tokens is None else tokens
        best = run is results.best
        style = {"color": colours[run.member.name]} | ({"linewidth": 3, "zorder": 4} if best else {})
        panel.plot(at, values, marker="o" if len(at) < 25 else None, markersize=3, **style)
        if best and len(at):
            panel.scatter(at[-1], values[-1], **BEST)
    panel.set(title="training loss" if key == LOSS else key, xlabel=axis_named)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    set_y_axis(panel, key)
