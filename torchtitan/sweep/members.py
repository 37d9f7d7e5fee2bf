"""The runs of a sweep: what each sets, its job, and its folder, named by what differs. Imports no torch."""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.config.errors import ConfigError, require
from torchtitan.config.job import JobConfig
from torchtitan.sweep.space import SEED, Assignment

VAGUE = ("name", "path", "weight", "enable")  # say too little without the section
LONGEST, LONGEST_VALUE = 160, 40  # characters of a folder's name, and of a text in it


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    index: int
    name: str  # of its folder
    settings: Assignment
    job: JobConfig

    @property
    def folder(self) -> Path:
        """Its dump folder."""
        return Path(self.job.job.dump_folder)

    @property
    def alike(self) -> tuple[tuple[str, str], ...]:
        """What it shares with the runs that differ in the seed alone."""
        return tuple((key, shown(value)) for key, value in self.settings.items() if key != SEED)


def members(
    assignments: Sequence[Assignment], out: Path, parse: Callable[[list[str]], JobConfig], only: int = -1
) -> list[Member]:
    """The runs of all assignments, or that of index `only`. `parse`: command-line options -> the job.

    Raises ConfigError, with which run it is.
    """
    found = []
    for index, (settings, name) in enumerate(zip(assignments, names(assignments), strict=True)):
        if only not in (-1, index):
            continue
        try:
            job = parse([*options(settings), "--job.dump_folder", str(out / name)])
        except ConfigError as error:
            raise ConfigError(f"run {index} ({name}): {error}") from None
        found.append(Member(index, name, settings, job))
    return found


def check_members(found: Sequence[Member], check: Callable[[JobConfig], None]) -> None:
    """Check every run before any starts. Raises ConfigError: how many are wrong, and the first."""
    wrong = []
    for member in found:
        try:
            check(member.job)
        except ConfigError as error:
            wrong.append(f"run {member.index} ({member.name}): {error}")
    if len(wrong) == 1:
        raise ConfigError(wrong[0])
    many = f"{len(wrong)} of {len(found)} combinations cannot run"
    require(not wrong, f"{many}; the first is {''.join(wrong[:1])}")


def options(settings: Assignment) -> list[str]:
    """Settings as options of the command line."""
    given: list[str] = []
    for key, value in settings.items():
        section, _, field = key.rpartition(".")
        if isinstance(value, bool):
            given.append(f"--{key}" if value else f"--{section}.no_{field}")
        elif isinstance(value, list):
            given += [f"--{key}", *map(str, value)]
        else:
            given.append(f"--{key}={value}")
    return given


def names(assignments: Sequence[Assignment]) -> list[str]:
    """Names as `lr=0.001,optimizer.name=Muon,seed=1`, each from what its run sets, not from other runs."""
    short = short_keys(dict.fromkeys(key for settings in assignments for key in settings))
    found = []
    for settings in assignments:
        name = ",".join(f"{short[key]}={_in_a_name(value)}" for key, value in settings.items())
        if len(name) > LONGEST or any(_in_a_name(value) != shown(value) for value in settings.values()):
            name = f"{name[:LONGEST]}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:6]}"
        found.append(name)
    return found


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Option -> its last words, as many as distinguish it from the others."""
    keys = list(keys)
    found = {}
    for key in keys:
        words = key.split(".")
        for count in range(1, len(words) + 1):
            end = words[-count:]
            alone = sum(f".{other}".endswith("." + ".".join(end)) for other in keys) == 1
            if alone and not end[0].isdigit() and end[0] not in VAGUE:
                break
        found[key] = ".".join(end)
    return found


def shown(value: Any) -> str:
    """A value for people: 0.001, true, encoder+projector."""
    if isinstance(value, list):
        return "+".join(map(shown, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _in_a_name(value: Any) -> str:
    """A value in letters that no file system or shell minds, and not too long."""
    text = re.sub(r"[^\w.+-]+", "-", shown(value))[-LONGEST_VALUE:]
    return text.strip("-.") or "none" if isinstance(value, str) else text
