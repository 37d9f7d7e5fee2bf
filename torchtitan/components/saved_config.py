"""The configuration of each launch of a run, kept in its dump folder, and what differs between two.

config.toml                         of the newest launch: it repeats the run
launches/1-from-step-0.toml ...     of each, with the step that it went on from
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torchtitan.config.job import JobConfig
from torchtitan.config.parse import to_toml
from torchtitan.tools.disk import next_number
from torchtitan.tools.logging import logger

NEWEST, LAUNCHES = "config.toml", "launches"
# What belongs to one launch, not to what is trained: where it writes, and where it went on from.
OF_A_LAUNCH = ("job.", "checkpoint.load_step")

# Sections that say how a run is watched, saved or spread over ranks, not what it learns.
NOT_LEARNT = (
    "profiling.",
    "metrics.",
    "parallelism.",
    "checkpoint.",
    "activation_checkpoint.",
    "compile.",
    "comm.",
    "validation.",
)


class Change(NamedTuple):
    """An option that differs between two launches."""

    option: str
    before: Any  # None: not set
    now: Any

    def __str__(self) -> str:
        return f"{self.option} was {_shown(self.before)} and is {_shown(self.now)}"


def save_config(job: JobConfig, folder: Path, step: int) -> None:
    """The resolved job of a launch that goes on from `step`."""
    launches = folder / LAUNCHES
    launches.mkdir(parents=True, exist_ok=True)
    for path in (launches / f"{next_number(launches)}-from-step-{step}.toml", folder / NEWEST):
        path.write_text(to_toml(job), encoding="utf-8")


def read_config(folder: Path, step: int | None = None) -> dict[str, Any] | None:
    """The tables of the newest launch, or of the one that trained up to `step`, which a later one that saved
    nothing did not. None where there are none; a warning where they cannot be read.
    """
    path = folder / NEWEST if step is None else _trained(folder, step)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(f"{path}: {error}; so options are not compared with those of the launch before")
        return None


def _trained(folder: Path, step: int) -> Path:
    launches = {}
    for path in (folder / LAUNCHES).glob("*.toml"):
        if (match := re.fullmatch(r"(\d+)-from-step-(\d+)", path.stem)) and int(match[2]) < step:
            launches[int(match[1])] = path
    return launches[max(launches)] if launches else folder / NEWEST


def changes(saved: dict[str, Any], job: JobConfig) -> list[Change]:
    """Options that differ between a saved configuration and `job`, both resolved."""
    found = differences(*(dict(leaves(table)) for table in (saved, tomllib.loads(to_toml(job)))))
    return [change for change in found if not change.option.startswith(OF_A_LAUNCH)]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What two tables of options do not have alike; None stands for what one of them lacks."""
    found = [Change(name, before.get(name), now.get(name)) for name in {**now, **before}]
    return [change for change in found if change.before != change.now]


def learnt(changed: list[Change]) -> list[Change]:
    """Those that change what a run learns."""
    return [change for change in changed if not change.option.startswith(NOT_LEARNT)]


def leaves(table: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested tables by name: ("data.sources[0].weight", 2.0) and so on."""
    if isinstance(table, dict):
        for name, value in table.items():
            yield from leaves(value, f"{key}.{name}" if key else name)
    elif isinstance(table, list) and table and isinstance(table[0], dict):
        for number, item in enumerate(table):
            yield from leaves(item, f"{key}[{number}]")
    else:
        yield key, table


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "not set"
    return str(value).lower() if isinstance(value, bool) else str(value)
