"""The figures of all runs of a sweep: a table for the console, and sweep.csv. Imports no torch."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.components.run_record import HELD_OUT_LOSS, RunRecord, place_of_best, read_run
from torchtitan.config.errors import did_you_mean, require
from torchtitan.sweep.members import Member, short_keys, shown
from torchtitan.sweep.space import SEED, Axis
from torchtitan.sweep.status import Status, status_of
from torchtitan.tools.disk import write_whole

TABLE = "sweep.csv"
LOSS = "loss"


@dataclass(frozen=True)
class Result:
    """A run, what has become of it, and its figures."""

    member: Member
    status: Status
    record: RunRecord


@dataclass(frozen=True)
class Results:
    """All runs, what was swept, and the figure that says which run is best."""

    runs: list[Result]
    axes: list[Axis]
    metric: str

    @property
    def best(self) -> Result | None:
        """The best run by the last value of the metric; a finished one, where there is any."""
        runs = [run for run in self.runs if run.status.state == "finished"] or self.runs
        place = place_of_best(self.metric, [run.record.last(self.metric) for run in runs])
        return None if place is None else runs[place]

    @property
    def keys(self) -> dict[str, str]:
        """Swept option -> how it is called in tables and pictures."""
        return short_keys(key for axis in self.axes for key in axis)


def read_results(found: Sequence[Member], axes: list[Axis], metric: str = "") -> Results:
    """The results of all runs. Raises ConfigError where some have figures, but none has `metric`."""
    runs = [Result(member, status_of(member), read_run(member.folder)) for member in found]
    known = list(dict.fromkeys(key for run in runs for key in run.record.keys))
    there = not metric or not known or metric in known
    require(there, f"sweep.metric = {metric}: no run has it{did_you_mean(metric, known)}")
    return Results(runs, axes, metric or (HELD_OUT_LOSS if HELD_OUT_LOSS in known else LOSS))


def write_csv(results: Results, folder: Path) -> Path:
    """A line a run: what it sets, what has become of it, best of the metric, last of every figure."""
    keys = list(dict.fromkeys(key for run in results.runs for key in run.record.keys))
    heads = ["index", "run", *results.keys, "state", "step", "seconds", "best_run"]
    heads += [f"best {results.metric}", f"step of best {results.metric}", *(f"last {key}" for key in keys)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for run in results.runs:
        member, record = run.member, run.record
        cells: list[Any] = [member.index, member.name, *(shown(member.settings[key]) for key in results.keys)]
        cells += [run.status.state, record.step, run.status.seconds, run is results.best]
        cells += [*(record.best(results.metric) or ("", "")), *(record.last(key) for key in keys)]
        writer.writerow(["" if cell is None else cell for cell in cells])
    path = folder / TABLE
    write_whole(path, text.getvalue())
    return path


def table(results: Results) -> str:
    """The runs in their order, the best with a star; under them what seeds give together."""
    metric, short = results.metric, results.keys
    heads = ["", "run", *short.values(), "state", "step", "loss", f"{metric} last", "best", "at step"]
    if metric == LOSS:
        heads.remove("loss")
    rows = []
    for run in results.runs:
        record, best = run.record, run.record.best(metric)
        row = ["*" if run is results.best else "", str(run.member.index)]
        row += [shown(value) for value in run.member.settings.values()]
        row += [run.status.state, str(record.step)]
        row += [] if metric == LOSS else [figure(record.last(LOSS))]
        row += [figure(record.last(metric)), *((figure(best[0]), str(best[1])) if best else ("-", "-"))]
        rows.append(row)
    text = columns([heads, *rows])
    by_seed = over_seeds(results)
    return text if len(by_seed) == len(rows) else f"{text}\n\n{_seeds(results, by_seed)}"


def over_seeds(results: Results) -> dict[tuple[tuple[str, str], ...], list[float]]:
    """Settings without the seed -> the last value of the metric of each seed that has one."""
    found: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for run in results.runs:
        value = run.record.last(results.metric)
        found.setdefault(run.member.alike, []).extend([] if value is None else [value])
    return found


def _seeds(results: Results, by_seed: dict[tuple[tuple[str, str], ...], list[float]]) -> str:
    means = [statistics.fmean(values) if values else None for values in by_seed.values()]
    best = place_of_best(results.metric, means)
    keys = [short for key, short in results.keys.items() if key != SEED]
    rows = [["", *keys, "seeds", f"{results.metric} mean", "deviation"]]
    for place, (settings, values) in enumerate(by_seed.items()):
        mean = means[place]
        # a run that has diverged has no number
        deviate = mean is not None and math.isfinite(mean) and len(values) > 1
        row = ["*" if place == best else "", *(value for _, value in settings), str(len(values))]
        rows.append([*row, figure(mean), figure(statistics.stdev(values) if deviate else None)])
    return columns(rows)


def figure(value: float | None) -> str:
    """Five digits, or a dash."""
    return "-" if value is None else f"{value:.5g}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Text in columns, to the left where it begins with a letter in all of them, else to the right."""
    texts = [all(row[place][:1].isalpha() for row in rows) for place in range(len(rows[0]))]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    shape = list(zip(widths, texts, strict=True))
    return "\n".join(
        "  ".join(
            c.ljust(w) if text else c.rjust(w) for c, (w, text) in zip(row, shape, strict=True)
        ).rstrip()
        for row in rows
    )
