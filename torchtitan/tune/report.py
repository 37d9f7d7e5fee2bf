"""What came of all candidates: a table, tune.csv, tune.json, and the lines for the TOML. Imports no torch."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchtitan.config.errors import require
from torchtitan.config.table import literal
from torchtitan.sweep.results import columns
from torchtitan.sweep.space import Assignment
from torchtitan.tools.disk import write_whole
from torchtitan.tune.trial import MEMORY, SECONDS, Trial

TABLE, NUMBERS = "tune.csv", "tune.json"
WAITS = 5.0  # percent of the time: more is the loader's matter, and no candidate mends it


@dataclass(frozen=True)
class Row:
    """A candidate and what became of it."""

    settings: Assignment  # where it differs from the job
    shown: Mapping[str, str]  # column -> what it sets there
    planned_gib: float
    trial: Trial
    runs: int = 1  # that the trial is of


@dataclass
class Report:
    """The candidates in the order in which they were measured, the job as it is first."""

    folder: Path
    machine: str
    filled: Sequence[str]  # figures in percent that say how full slots are
    rows: list[Row] = field(default_factory=list)

    @property
    def best(self) -> Row | None:
        """The row with the most useful work a second; the job itself where none gains more than noise."""
        there = [row for row in self.rows if row.trial.work]
        if not there:
            return None
        own, best = self.rows[0], max(there, key=lambda row: row.trial.rate or 0.0)
        return own if own.trial.work and not best.trial.is_faster(own.trial) else best

    def ratio(self, row: Row) -> float | None:
        """Useful work a second, over that of the job as it is."""
        own, its = self.rows[0].trial.rate, row.trial.rate
        return its / own if own and its is not None else None


def table(report: Report) -> str:
    """All rows as columns, the best with a star."""
    heads = ["", *report.rows[0].shown, *(f"{name} %" for name in report.filled), "wait %", "s a step"]
    heads += ["tokens/s", "TFLOP/s", "middle half", "GiB", "planned", "x the job"]
    rows = []
    for number, row in enumerate(report.rows):
        mark = "*" if row is report.best else ""
        cells = [mark + str(number), *row.shown.values()]
        if not row.trial.work:
            last = [row.trial.state, *[""] * (len(report.filled) + 5), f"{row.planned_gib:.2f}", ""]
            rows.append([*cells, *last])
            continue
        f, (low, high), ratio = row.trial.figures, row.trial.middle, report.ratio(row)
        cells += [f"{f[name]:.1f}" if name in f else "" for name in (*report.filled, "data_wait")]
        cells += [
            f"{f[SECONDS]:.3g}",
            f"{f['tps']:,.0f}",
            f"{row.trial.rate:.4g}",
            f"{low:.4g} to {high:.4g}",
        ]
        cells += [f"{f[MEMORY]:.2f}", f"{row.planned_gib:.2f}", "" if ratio is None else f"{ratio:.3f}"]
        rows.append(cells)
    return columns([heads, *rows])


def verdict(report: Report) -> str:
    """In words: which is best, by how much, and what is not known. Something was measured."""
    own, best = report.rows[0], report.best
    assert best is not None
    tried = f"{len(report.rows)} {'candidate' if len(report.rows) == 1 else 'candidates'}"
    lines = []
    if best is own:
        fastest = max(report.rows, key=lambda row: row.trial.rate or 0.0)
        low, high = own.trial.middle
        noise = f"its own steps differ by {100 * (high - low) / (own.trial.rate or 1):.1f} %"
        none = f"keep the job as it is: of {tried} none is faster by more than steps differ ({noise})"
        close = f"; number {report.rows.index(fastest)} came nearest, and a larger --records says more"
        lines.append(none + (close if fastest is not own else ""))
    else:
        ratio = report.ratio(best)
        gain = "which does not run itself" if ratio is None else f"{ratio:.2f} times its useful work a second"
        lines.append(f"number {report.rows.index(best)} of {tried} is best: the job with these lines, {gain}")
        if own.trial.work and best.runs == 1:
            once = (
                "it and the job were measured once each: what differs between runs may be more than the gain"
            )
            lines.append(f"{once}; the same command measures both again")
    waits = best.trial.figures.get("data_wait", 0.0)
    if waits > WAITS:
        lines.append(f"the trainer waits for data {waits:.0f} % of its time: raise data.num_workers first")
    return "\n".join(lines)


def toml_lines(settings: Assignment) -> str:
    """Settings as they stand in a job file."""
    sections: dict[str, list[str]] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"{name} = {literal(value)}")
    return "\n\n".join("\n".join([f"[{section}]", *lines]) for section, lines in sections.items())


def write(report: Report) -> None:
    """tune.csv and tune.json: what each candidate sets, what became of it, and every figure."""
    records = [_record(report, row) for row in report.rows]
    heads = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(records)
    write_whole(report.folder / TABLE, text.getvalue())
    best = report.best
    whole = {
        "machine": report.machine,
        "best": None if best is None else report.rows.index(best),
        "settings": None if best is None else best.settings,
        "candidates": records,
    }
    write_whole(report.folder / NUMBERS, json.dumps(whole, indent=1) + "\n")


def require_same_machine(report: Report) -> None:
    """Raises ConfigError where the folder has what was measured on another machine."""
    path = report.folder / NUMBERS
    before = json.loads(path.read_text())["machine"] if path.is_file() else report.machine
    other = f"{report.folder} has what was measured on {before}, and this is {report.machine}"
    require(before == report.machine, f"{other}; give another --out")


def _record(report: Report, row: Row) -> dict[str, Any]:
    trial = row.trial
    record: dict[str, Any] = {**row.shown, "state": trial.state, "why": trial.why}
    low, high = trial.middle if trial.work else ("", "")
    ratio = report.ratio(row)
    record |= {"runs": row.runs, "seconds": trial.seconds, "planned_gib": round(row.planned_gib, 3)}
    record |= {"useful_tflops": trial.rate if trial.work else "", "lower_quarter": low, "upper_quarter": high}
    return record | {"x_the_job": "" if ratio is None else ratio} | trial.figures
