"""What has become of a run of a sweep: two files in its folder, and a lock while it runs. Imports no torch.

    job.toml      what the sweep asks for, and its trainer reads; config.toml is what the trainer made of it
    sweep.json    {"exit_code": 0, "seconds": 81.2}: how it ended (null: it did not), in all its launches
    lock          held while it runs; by the trainer too, which may live longer than the sweep

A run is finished where its trainer said so by exit code 0, and is asked for no more steps since. What a
trainer does in a folder that was used before is its own rule (components/dump_folder.py).
"""

import contextlib
import json
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torchtitan.components.checkpoint_folder import complete_steps
from torchtitan.components.saved_config import changes, learnt
from torchtitan.components.sinks import HISTORY
from torchtitan.config.errors import require
from torchtitan.config.parse import to_toml
from torchtitan.sweep.members import Member
from torchtitan.tools.disk import write_whole
from torchtitan.tools.lock import take_lock

JOB, RECORD, LOCK, LOG = "job.toml", "sweep.json", "lock", "log.txt"
STOPPED = (129, 130, 143)  # exit codes of a run that a signal asked to save and stop
STEPS = "training.steps"
State = Literal["new", "cut", "failed", "running", "finished"]


@dataclass(frozen=True)
class Status:
    """`step`: of the newest checkpoint, 0 without one."""

    state: State
    step: int = 0
    why: str = ""  # of a run that failed
    seconds: float = 0.0

    def __str__(self) -> str:
        goes_on = f", goes on from step {self.step}" if self.step and self.state in ("cut", "failed") else ""
        return f"{self.state}{f': {self.why}' if self.why else ''}{goes_on}"


def status_of(member: Member) -> Status:
    """A run's state, by its folder and its lock."""
    status = ended(member)
    return replace(status, state="running", why="") if is_running(member.folder) else status


def ended(member: Member) -> Status:
    """A run's state by its folder alone, where no process but the caller holds it."""
    folder = member.folder
    record = read_record(folder)
    step = next(reversed(complete_steps(folder / member.job.checkpoint.folder)), 0)
    seconds, code = record.get("seconds", 0.0), record.get("exit_code")
    if code == 0:
        more = any(change.option == STEPS for change in _changes(member))
        return Status("cut" if more else "finished", step, seconds=seconds)
    if code is None or code in STOPPED:
        return Status("cut" if (folder / HISTORY).is_file() else "new", step, seconds=seconds)
    return Status("failed", step, f"exit code {code}{_last_line(folder)}", seconds)


def require_same_job(member: Member, changes_nothing: Callable[[str], bool]) -> None:
    """Raises ConfigError where a run that was begun was another one than it would be now.

    `changes_nothing`: whether a run may go on with another value of that option.
    """
    if not (member.folder / HISTORY).is_file():
        return
    others = [
        change
        for change in learnt(_changes(member))
        if not (changes_nothing(change.option) or change.option == STEPS and change.now > change.before)
    ]
    listed = "; ".join(map(str, others))
    require(not others, f"{member.folder} was begun with other options: {listed}; give another --out")


def begin(member: Member) -> None:
    """Write, before its trainer starts, what it is asked for, and that it has not ended."""
    member.folder.mkdir(parents=True, exist_ok=True)
    write_whole(member.folder / JOB, to_toml(member.job))
    write_record(member.folder, None, read_record(member.folder).get("seconds", 0.0))


def read_record(folder: Path) -> dict[str, Any]:
    """The record of how a run ended; {} where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / RECORD).read_text())
    return {}


def write_record(folder: Path, exit_code: int | None, seconds: float) -> None:
    """Record how a run ended; None: it has begun."""
    write_whole(folder / RECORD, json.dumps({"exit_code": exit_code, "seconds": round(seconds, 1)}) + "\n")


def is_running(folder: Path) -> bool:
    """Whether a process has the run's lock."""
    if not (folder / LOCK).is_file():
        return False
    held = take_lock(folder / LOCK)
    if held is not None:
        os.close(held)
    return held is None


def _changes(member: Member) -> list:
    path = member.folder / JOB
    try:
        return changes(tomllib.loads(path.read_text(encoding="utf-8")), member.job)
    except FileNotFoundError:
        return []


def _last_line(folder: Path) -> str:
    path = folder / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    return f" ({said[-1][:200]})" if said else ""
