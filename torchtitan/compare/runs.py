"""Which folders are runs, what they are called, and which of their options differ. Imports no torch."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.components.run_record import RunRecord, read_run
from torchtitan.components.saved_config import NEWEST, OF_A_LAUNCH, leaves
from torchtitan.components.sinks import HISTORY
from torchtitan.config.errors import require


@dataclass(frozen=True)
class Named:
    """A run, and its name among the others."""

    name: str
    record: RunRecord


def read_runs(paths: Iterable[str]) -> list[Named]:
    """The runs of dump folders, and of folders of them (a sweep). Raises ConfigError without any."""
    folders = list(dict.fromkeys(folder for path in paths for folder in _runs_in(path)))
    return [Named(name, read_run(folder)) for name, folder in zip(short_names(folders), folders, strict=True)]


def _runs_in(path: str) -> list[Path]:
    folder = Path(path)
    require(folder.is_dir(), f"{path}: no such folder (looked from {Path.cwd()})")
    if (folder / HISTORY).is_file():
        return [Path(os.path.normpath(folder))]
    inside = sorted(file.parent for file in folder.glob(f"*/{HISTORY}"))
    require(bool(inside), f"{path}: holds no {HISTORY}, nor does a folder in it; give dump folders of runs")
    return [Path(os.path.normpath(one)) for one in inside]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The ends of their paths, as long as it takes to distinguish all of them."""
    whole = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, whole), default=1) + 1):
        found = [os.path.join(*parts[-length:]) for parts in whole]
        if len(set(found)) == len(found):
            return found
    return [str(folder) for folder in folders]


def options_of(run: RunRecord) -> dict[str, Any]:
    """Option -> value, as the newest launch resolved it; what belongs to a launch alone is left out."""
    return {key: value for key, value in leaves(run.config) if not key.startswith(OF_A_LAUNCH)}


def differing(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Option -> its value in each run (None: not set), where those whose options are known differ."""
    known = [n for n, run in enumerate(runs) if run.config]
    tables = [options_of(run) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    found = {key: [table.get(key) for table in tables] for key in keys}
    return {key: row for key, row in found.items() if any(row[n] != row[known[0]] for n in known)}


def sources_of(run: RunRecord) -> set[str]:
    """What the data sources of a run are called: every `name` in a list of `sources`."""
    found = set()
    for section in run.config.values():
        listed = section.get("sources", []) if isinstance(section, dict) else []
        found |= {source.get("name", "") for source in listed if isinstance(source, dict)}
    return found - {""}


def missing_config(runs: Sequence[Named]) -> list[str]:
    """Runs of which no options are known."""
    return [f"{run.name} has no {NEWEST}" for run in runs if not run.record.config]
