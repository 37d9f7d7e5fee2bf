"""sweep.png: every run's loss over tokens, and the last and best figure against each swept value."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.components.run_record import RunRecord, lower_is_better
from torchtitan.sweep.members import shown
from torchtitan.sweep.results import LOSS, Result, Results
from torchtitan.sweep.space import SEED

PICTURE = "sweep.png"
NAMED = 10  # runs that a legend names; where there are more, a colour says how good each is
TALL = 20.0  # an axis of figures is logarithmic where the greatest is so many times the least
APART = 0.1  # of an axis: room for the number below each place
ACROSS = 3  # panels of swept options beside each other
BEST = {"marker": "*", "s": 260, "facecolor": "gold", "edgecolor": "black", "zorder": 5}


def draw(results: Results, folder: Path) -> Path:
    """Of the runs that have figures, at least one. Returns the picture's path."""
    import matplotlib  # 0.5 s, and only a sweep's end needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [run for run in results.runs if run.record.history]
    swept = [key for key in results.keys if key != SEED and _differs(key, drawn)] or list(results.keys)
    figures = list(dict.fromkeys([LOSS, results.metric]))
    rows = 1 + math.ceil(len(swept) / ACROSS)
    figure = pyplot.figure(figsize=(15, 0.5 + 4.6 * rows), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, rows - 1])
    top, below = halves
    colours = _colours(results, drawn, matplotlib)
    for panel, key in zip(np.atleast_1d(top.subplots(1, len(figures))), figures, strict=True):
        _over_tokens(panel, results, drawn, key, colours)
    panels = below.subplots(rows - 1, min(ACROSS, len(swept)), squeeze=False).flat
    for panel, key in zip(panels, swept, strict=False):
        _against(panel, results, drawn, key)
    for left_over in list(below.axes)[len(swept) :]:
        left_over.remove()
    _legend(top, results, drawn, colours)
    path = folder / PICTURE
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _differs(key: str, drawn: Sequence[Result]) -> bool:
    return len({shown(run.member.settings[key]) for run in drawn}) > 1


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


def _over_tokens(
    panel: Any, results: Results, drawn: Sequence[Result], key: str, colours: dict[str, Any]
) -> None:
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
    _y_axis(panel)


def _legend(top: Any, results: Results, drawn: Sequence[Result], colours: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    named = drawn if len(drawn) <= NAMED else [run for run in drawn if run is results.best]
    handles = [Line2D([], [], color=colours[run.member.name], linewidth=3) for run in named]
    labels = [f"{run.member.name}{'  (best)' if run is results.best else ''}" for run in named]
    if len(drawn) > NAMED:
        labels = [f"{label}; the others from the best (dark) to the worst" for label in labels]
    if handles:
        top.legend(handles, labels, loc="outside lower center", ncols=min(3, len(handles)), frameon=False)


def _against(panel: Any, results: Results, drawn: Sequence[Result], key: str) -> None:
    """A line for the runs that share all but this option and the seed, through the means of their last."""
    places = _x_axis(panel, [run.member.settings[key] for run in drawn])
    groups: dict[str, list[Result]] = {}
    for run in drawn:
        rest = {results.keys[k]: v for k, v in run.member.settings.items() if k not in (key, SEED)}
        groups.setdefault(", ".join(f"{k}={shown(v)}" for k, v in rest.items()), []).append(run)
    for number, (others, runs) in enumerate(groups.items()):
        colour = f"C{number}" if len(groups) <= NAMED else "C0"
        last = _by_place(runs, places, key, lambda record: record.last(results.metric))
        best = _by_place(runs, places, key, lambda record: (record.best(results.metric) or [None])[0])
        means = [(x, np.mean(ys)) for x, ys in sorted(last.items())]
        if means:
            panel.plot(*zip(*means, strict=True), color=colour, linewidth=1.2, label=others)
        for found, face in ((last, colour), (best, "none")):
            points = [(x, y) for x, ys in found.items() for y in ys]
            if points:
                panel.scatter(*zip(*points, strict=True), edgecolor=colour, facecolor=face, s=45, zorder=3)
    winner = results.best
    if winner is not None:
        panel.scatter(places[shown(winner.member.settings[key])], winner.record.last(results.metric), **BEST)
    if 1 < len(groups) <= NAMED:
        panel.legend(fontsize="small")
    panel.set(title=f"{results.metric}:  \u25cf last  \u25cb best  \u2605 of the best run", xlabel=key)
    _y_axis(panel)


def _by_place(
    runs: Sequence[Result],
    places: dict[str, float],
    key: str,
    value_of: Callable[[RunRecord], float | None],
) -> dict[float, list[float]]:
    """Where on the axis -> the values of the runs there that are numbers."""
    found: dict[float, list[float]] = {}
    for run in runs:
        value = value_of(run.record)
        if value is not None and math.isfinite(value):
            found.setdefault(places[shown(run.member.settings[key])], []).append(value)
    return found


def _x_axis(panel: Any, values: Sequence[Any]) -> dict[str, float]:
    """Value, as it is shown -> its place: itself if it is a number, else one after the other."""
    numbers = sorted(
        {value for value in values if isinstance(value, int | float) and not isinstance(value, bool)}
    )
    if len(numbers) == len(set(map(shown, values))):
        places = {shown(value): float(value) for value in numbers}
        gaps = _gaps(numbers)
        if numbers[0] > 0 and max(_gaps(np.log(numbers))) < max(gaps):  # more even so
            panel.set_xscale("log")
            gaps = _gaps(np.log(numbers))
        panel.minorticks_off()
        if min(gaps) < APART:
            return places
    else:
        places = {text: float(place) for place, text in enumerate(dict.fromkeys(map(shown, values)))}
        panel.margins(x=0.3)
    panel.set_xticks(list(places.values()), list(places))
    return places


def _gaps(numbers: Any) -> list[float]:
    """Between neighbours, as shares of the whole; one number has all room."""
    return [1.0] if len(numbers) < 2 else list(np.diff(numbers) / (numbers[-1] - numbers[0]))


def _y_axis(panel: Any) -> None:
    """Logarithmic where the values span much, so that one run gone astray does not flatten the others."""
    panel.grid(alpha=0.3)
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in panel.lines] or [np.empty(0)])
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) and drawn.min() > 0 and drawn.max() >= TALL * drawn.min():
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
