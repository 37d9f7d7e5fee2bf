"""data_report.json: what the loaders of all ranks delivered and rejected so far."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchtitan.distributed.collectives import from_all_ranks
from torchtitan.tools.disk import write_whole

REPORT = "data_report.json"


def merge(reports: list[Any]) -> Any:
    """Add numbers, merge mappings, join lists; all else is the same everywhere: the first is taken."""
    if isinstance(reports[0], Mapping):
        keys = dict.fromkeys(key for report in reports for key in report)
        return {key: merge([report[key] for report in reports if key in report]) for key in keys}
    if isinstance(reports[0], list):
        return [item for report in reports for item in report]
    if isinstance(reports[0], (int, float)) and not isinstance(reports[0], bool):
        return sum(reports)
    return reports[0]


def write_data_report(folder: Path, own: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Called by all ranks; `own` is None on a rank whose slots another rank reports.

    Returns what rank 0 wrote, to it.
    """
    reports = from_all_ranks(own)
    if dist.get_rank() != 0:
        return None
    whole: dict[str, Any] = merge([report for report in reports if report is not None])
    save_report(folder, whole)
    return whole


def save_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the report of one loader, or one merged, into the folder of a run."""
    write_whole(folder / REPORT, json.dumps(report, indent=1, sort_keys=True))
