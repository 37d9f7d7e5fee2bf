"""A comparison of several runs on one HTML page that loads nothing else."""

import html
import json
import re
from collections.abc import Collection, Sequence
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from torchtitan.compare.charts import AXES, BY_SOURCE, GROUPS, HELD_OUT_GROUP, charts
from torchtitan.compare.runs import Named, differing, missing_config, options_of
from torchtitan.components.run_record import HELD_OUT_LOSS, Axis, RunRecord, place_of_best

# Dark enough on white, and far from each other.
COLOURS = (
    *("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00", "#b82e2e"),
    *("#316395", "#994499", "#22aa99", "#aaaa11", "#6633cc", "#e67300", "#8b0707", "#651067", "#329262"),
)
RATES = ("tps", "tflops", "mfu", "memory", "data_wait")  # shown as means over the run, where they are known


def compare_page(runs: Sequence[Named], occupancy: Collection[str]) -> str:
    """The page: options that differ, what came of each run, and every figure over steps, tokens and hours."""
    drawn = charts(runs, occupancy)
    groups = [group for group in GROUPS if any(chart["group"] == group for chart in drawn)]
    named = [{"name": run.name, "colour": _colour(number)} for number, run in enumerate(runs)]
    return Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(" and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"),
        facts=html.escape("; ".join(missing_config(runs))),
        summary=summary(runs, occupancy),
        options=options_table(runs),
        sources=by_source(runs, drawn),
        groups="\n".join(
            f'<h2>{group}</h2><div class="charts" data-group="{group}"></div>' for group in groups
        ),
        data=json.dumps({"runs": named, "charts": drawn}, allow_nan=False).replace("<", "\\u003c"),
    )


def options_table(runs: Sequence[Named]) -> str:
    """A row for each option that differs, a column for each run."""
    found = differing([run.record for run in runs])
    alike = len({key for run in runs for key in options_of(run.record)}) - len(found)
    note = f"<p class=facts>{alike} options are the same in all.</p>"
    if not found:
        return note
    has_options = [bool(run.record.config) for run in runs]
    rows = [[key, *map(_value, row, has_options)] for key, row in found.items()]
    return _table(["option", *_heads(runs)], rows) + note


def summary(runs: Sequence[Named], occupancy: Collection[str]) -> str:
    """A row for each run: how far it went, its losses, how fast and how full it was."""
    known = {key for run in runs for key in run.record.keys}
    held_out = [HELD_OUT_LOSS] if HELD_OUT_LOSS in known else []
    means = [key for key in (*RATES, *occupancy) if key in known]
    axes: list[Axis] = [axis for axis in AXES[1:] if any(_end(run.record, axis) is not None for run in runs)]
    heads = ["run", "steps", *axes, "loss"]
    heads += ["held-out loss, last", "best", "at step"] if held_out else []
    heads += [f"{key}, mean" for key in means]
    judged = HELD_OUT_LOSS if held_out else "loss"
    last = [run.record.last(judged) for run in runs]
    best = place_of_best(judged, last) if len(last) - last.count(None) > 1 else None
    rows = []
    for number, (run, head) in enumerate(zip(runs, _heads(runs), strict=True)):
        record = run.record
        row = [head, f"{record.step:,}", *(_figure(_end(record, axis)) for axis in axes)]
        row += [_figure(record.last("loss"))]
        for key in held_out:
            value, step = record.best(key) or (None, None)
            row += [_figure(record.last(key)), _figure(value), "" if step is None else str(step)]
        row += [_figure(_mean(record, key)) for key in means]
        rows.append(["<b>" + cell + "</b>" if number == best and cell else cell for cell in row])
    return _table(heads, rows)


def by_source(runs: Sequence[Named], drawn: Sequence[dict[str, Any]]) -> str:
    """The last value of every figure that sources have of their own, and of every held-out one."""
    keys = [chart["key"] for chart in drawn if chart["group"] in (HELD_OUT_GROUP, BY_SOURCE)]
    rows = [[html.escape(key), *(_figure(run.record.last(key)) for run in runs)] for key in keys]
    return _table(["last value of", *_heads(runs)], rows) if rows else "<p class=facts>none</p>"


def _heads(runs: Sequence[Named]) -> list[str]:
    """Column heads: the runs' names, which may break after a comma or a folder."""
    names = [re.sub("([,/])", r"\1<wbr>", html.escape(run.name)) for run in runs]
    return [f'<i style="background:{_colour(number)}"></i>{name}' for number, name in enumerate(names)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(
        f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _value(value: Any, is_known: bool) -> str:
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    absent = f'<span class="facts">not {"set" if is_known else "known"}</span>'
    return absent if value is None else html.escape(shown)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.5g}"


def _end(record: RunRecord, axis: Axis) -> float | None:
    at = record.on_axis(np.array([record.step], dtype=np.float64), axis)
    return None if at is None else float(at[0])


def _mean(record: RunRecord, key: str) -> float | None:
    """The mean of a figure, without the first record where there are more: it holds the start-up."""
    _, values = record.values(key)
    return float(values[1:].mean() if len(values) > 1 else values[0]) if len(values) else None
