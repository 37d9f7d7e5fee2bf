"""The checkpoints of a run on the disk: one folder a step, there whole or not at all. Imports no torch.

checkpoint/step-100/                complete: it got this name when everything in it was written
    .metadata  __0_0.distcp ...     tensors, by name, in the shards that the ranks held
    train_state.json                step and the like, for people too
checkpoint/step-200.incomplete/     being written, or what a killed run left; never read
"""

import json
import re
from pathlib import Path
from typing import Any

from torchtitan.config.errors import ConfigError
from torchtitan.config.job import Checkpoint

RECORD = "train_state.json"
INCOMPLETE, DELETED = ".incomplete", ".deleted"


class Damaged(ConfigError):
    """A complete checkpoint that cannot be read, and how to go on without it."""

    def __init__(self, path: Path, why: str, own: bool = True):
        """`own`: of this run; if not, it is that of checkpoint.initial_load_path."""
        self.path, self.why = path, why
        before = steps_before(path)
        if own:
            step = f"go on from the one before with --checkpoint.load_step {before[-1]}" if before else ""
            go_on = step or "there is none before it: start anew in another job.dump_folder"
        else:
            option = "--checkpoint.initial_load_path"
            other = f"another one there: {option} {path.parent}/step-{before[-1]}" if before else ""
            go_on = other or "give another checkpoint.initial_load_path"
        super().__init__(f"checkpoint {path} cannot be read ({why}); {go_on}")


def complete_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    names = [path.name for path in folder.glob("step-*")] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name)))


def steps_before(path: Path) -> list[int]:
    """Steps of the complete checkpoints before this one; none where it is not called step-NUMBER."""
    own = re.fullmatch(r"step-(\d+)", path.name)
    return [step for step in complete_steps(path.parent) if own and step < int(own[1])]


def find(options: Checkpoint, folder: Path) -> Path | None:
    """The checkpoint that a run goes on from, if any. Raises ConfigError where load_step names none."""
    if not options.enable:
        return None
    steps, asked = complete_steps(folder), options.load_step
    if asked >= 0 and asked not in steps:
        known = steps or "none"
        raise ConfigError(f"checkpoint.load_step = {asked} is not in {folder}; complete there: {known}")
    if not steps:
        return None
    return folder / f"step-{asked if asked >= 0 else steps[-1]}"


def find_initial(options: Checkpoint) -> Path | None:
    """`initial_load_path`: a checkpoint, or the latest of a folder; None for a Hugging Face folder."""
    if not options.initial_load_path or options.initial_load_in_hf:
        return None
    path = Path(options.initial_load_path)
    steps = complete_steps(path)
    path = path / f"step-{steps[-1]}" if steps else path
    if not (path / RECORD).is_file():
        asked = f"checkpoint.initial_load_path = {options.initial_load_path}"
        if (path / "config.json").is_file():
            raise ConfigError(f"{asked}: that is a Hugging Face folder, set checkpoint.initial_load_in_hf")
        raise ConfigError(f"{asked}: no complete checkpoint there")
    return path


def read_record(path: Path) -> dict[str, Any]:
    """train_state.json of a checkpoint. Raises Damaged where it is not there or cannot be read."""
    try:
        return json.loads((path / RECORD).read_text())
    except FileNotFoundError:
        raise Damaged(path, f"it has no {RECORD}") from None
    except (OSError, ValueError) as error:
        raise Damaged(path, f"{RECORD}: {error}") from None
