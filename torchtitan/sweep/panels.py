"""The panels of sweep.png: the last and best figure of each run against the values of an option.

Options whose values go together are one axis, and all their values stand below each place. A run is named by
what distinguishes it from the others.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from torchtitan.components.run_record import RunRecord, lower_is_better
from torchtitan.sweep.members import shown
from torchtitan.sweep.results import Result, Results
from torchtitan.sweep.space import SEED, Axis

NAMED = 10  # runs or lines that a legend names
TALL = 20.0  # an axis of losses is logarithmic where the greatest is so many times the least
WIDE = 10.0  # an axis of values may be logarithmic where they span so much
APART = 0.1  # of an axis: room for the number below each place
LONGEST = 40  # characters of a value, the last ones
CHARACTER, ENTRY = 0.09, 0.7  # inches: of text, and what a legend's entry adds
MARKS = "\u25cf last  \u25cb best  \u2605 of the best run"
BEST = {"marker": "*", "s": 260, "facecolor": "gold", "edgecolor": "black", "zorder": 5}
Values = tuple[str, ...]  # of the options of an axis, as they are shown
Line = tuple[str, list[Result]]  # what runs share, and these


def swept_axes(results: Results, drawn: Sequence[Result]) -> Sequence[Axis]:
    """Axes that have several values in the drawn runs, but for the seed; all where there is none."""
    return [
        axis for axis in results.axes if axis != (SEED,) and differing_keys([axis], drawn)
    ] or results.axes


def differing_keys(axes: Sequence[Axis], runs: Sequence[Result]) -> list[str]:
    """Options whose values distinguish the runs; one of an axis, where one is enough."""
    found: list[str] = []
    for axis in axes:
        count = len({_values(run, axis) for run in runs})
        alone = [key for key in axis if len({_values(run, (key,)) for run in runs}) == count]
        found += (alone[:1] or axis) if count > 1 else []
    return found


def label_of(run: Result, keys: Sequence[str], results: Results) -> str:
    """`resize=native, lr=0.001`, of these options."""
    return ", ".join(f"{results.keys[key]}={_brief(shown(run.member.settings[key]))}" for key in keys)


def lines_of(results: Results, drawn: Sequence[Result], axis: Axis) -> list[Line]:
    """The runs that share all but this axis and the seed."""
    keys = differing_keys([other for other in results.axes if other not in (axis, (SEED,))], drawn)
    found: dict[Values, list[Result]] = {}
    for run in drawn:
        found.setdefault(_values(run, keys), []).append(run)
    return [(label_of(runs[0], keys, results), runs) for runs in found.values()]


def draw_panel(
    panel: Any, results: Results, axis: Axis, lines: Sequence[Line], colours: dict[str, Any], width: float
) -> None:
    """Each line goes through the means of its runs' last figures, and has a gap where one is no number.

    Where no line has two places, as in draws, a run has its colour of `colours`. width: inches.
    """
    places = _x_axis(panel, axis, [run for _, runs in lines for run in runs], width)
    scattered = _scattered(axis, lines)
    for number, (label, runs) in enumerate(lines):
        colour = f"C{number}" if len(lines) <= NAMED else "C0"
        at = [places[_values(run, axis)] for run in runs]
        last = _known(runs, at, lambda record: record.last(results.metric))
        best = _known(runs, at, lambda record: (record.best(results.metric) or [None])[0])
        means = [(x, np.mean([y for _, x_, y in last if x_ == x])) for x in sorted({x for _, x, _ in last})]
        if means:
            panel.plot(*zip(*means, strict=True), color=colour, linewidth=1.2, label=label)
        for points, filled in ((last, True), (best, False)):
            for name, x, y in points:
                edge = colours[name] if scattered else colour
                panel.scatter(x, y, edgecolor=edge, facecolor=edge if filled else "none", s=45, zorder=3)
    winner = results.best
    if winner is not None:
        panel.scatter(places[_values(winner, axis)], winner.record.last(results.metric), **BEST)
    if legend_rows(axis, lines, width):
        columns = fitting_columns([label for label, _ in lines], width)
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False)
    set_y_axis(panel, results.metric)


def legend_rows(axis: Axis, lines: Sequence[Line], width: float) -> int:
    """Rows of the legend above a panel; 0: it has none."""
    if not 1 < len(lines) <= NAMED or _scattered(axis, lines):
        return 0
    return math.ceil(len(lines) / fitting_columns([label for label, _ in lines], width))


def _scattered(axis: Axis, lines: Sequence[Line]) -> bool:
    return len(lines) > 1 and all(len({_values(run, axis) for run in runs}) == 1 for _, runs in lines)


def fitting_columns(labels: Collection[str], width: float) -> int:
    """Columns of a legend that is so many inches wide."""
    return max(1, min(len(labels), int(width / (ENTRY + CHARACTER * max(map(len, labels), default=0)))))


def set_y_axis(panel: Any, key: str) -> None:
    """Make the axis logarithmic where losses span much: a diverged run shall not flatten the others."""
    panel.grid(alpha=0.3)
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in panel.lines] or [np.empty(0)])
    drawn = drawn[np.isfinite(drawn)]
    if lower_is_better(key) and len(drawn) and drawn.min() > 0 and drawn.max() >= TALL * drawn.min():
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")


def _values(run: Result, keys: Sequence[str]) -> Values:
    return tuple(shown(run.member.settings[key]) for key in keys)


def _brief(text: str) -> str:
    brief = text if len(text) <= LONGEST else f"\u2026{text[1 - LONGEST :]}"
    return brief.replace("$", r"\$")  # else matplotlib reads mathematics


def _known(
    runs: Sequence[Result], at: Sequence[float], value_of: Callable[[RunRecord], float | None]
) -> list[tuple[str, float, float]]:
    """Name, place and value of the runs that have one."""
    values = [value_of(run.record) for run in runs]
    return [
        (run.member.name, x, value)
        for run, x, value in zip(runs, at, values, strict=True)
        if value is not None
    ]


def _x_axis(panel: Any, axis: Axis, runs: Sequence[Result], width: float) -> dict[Values, float]:
    """Values -> their place: a number's is itself, all else stands one after the other."""
    panel.set_xlabel("\n".join(axis))
    seen = {_values(run, axis): run.member.settings[axis[0]] for run in runs}
    numbers = {
        values: float(value)
        for values, value in seen.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if len(axis) == 1 and len(numbers) == len(seen):
        ordered = sorted(numbers.values())
        gaps = _gaps(ordered)
        if (
            ordered[0] > 0
            and ordered[-1] >= WIDE * ordered[0]
            and _uneven(_gaps(np.log(ordered))) < _uneven(gaps)
        ):
            panel.set_xscale("log")
            gaps = _gaps(np.log(ordered))
        if min(gaps) >= APART:
            panel.minorticks_off()
            panel.set_xticks(list(numbers.values()), [value for (value,) in numbers])
        return numbers
    places = {values: float(place) for place, values in enumerate(seen)}
    panel.margins(x=0.3 if len(places) < 4 else 0.1)
    labels = ["\n".join(map(_brief, values)) for values in places]
    longest = max(len(_brief(value)) for values in places for value in values)
    crowded = longest * CHARACTER * len(places) > width
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    panel.set_xticks(list(places.values()), labels, **slanted)
    return places


def _gaps(numbers: Any) -> list[float]:
    """Gaps between neighbours, as shares of the whole; one number has all room."""
    return [1.0] if len(numbers) < 2 else list(np.diff(numbers) / (numbers[-1] - numbers[0]))


def _uneven(gaps: Sequence[float]) -> float:
    return sum(gap * gap for gap in gaps)
