"""A used dump folder: its run is finished, goes on, or makes room for a fresh one. Nothing is lost or mixed.

finished     a checkpoint of the last step: one line, and nothing is changed; but where its last held-out
             figures are missing, they are taken
goes on      from its checkpoint; options that differ are named, or refused where they make no sense
fresh        no checkpoint to go on from: the files of the run before move to previous/1/, previous/2/ ...
"""

import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan.components.checkpoint_folder import complete_steps, find, read_record
from torchtitan.components.curves import CURVES
from torchtitan.components.data_report import REPORT
from torchtitan.components.hf_save import FOLDER as HF_FOLDER
from torchtitan.components.run_record import HELD_OUT
from torchtitan.components.saved_config import LAUNCHES, NEWEST, Change, changes, learnt, read_config
from torchtitan.components.sinks import HISTORY, WANDB_ID, read_history
from torchtitan.components.tokenizer import find_file
from torchtitan.components.validation import TASKS_FOLDER, TASKS_SUMMARY
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import JobConfig
from torchtitan.distributed.process_group import TRACES
from torchtitan.tools.disk import next_number
from torchtitan.tools.logging import logger

PREVIOUS = "previous"
FILES = (HISTORY, WANDB_ID, REPORT, CURVES, NEWEST, LAUNCHES, "rejects", TRACES, HF_FOLDER, TASKS_FOLDER)
FOLDERS = ("metrics.save_tb_folder", "profiling.save_traces_folder", "profiling.save_memory_snapshot_folder")


def begin(job: JobConfig) -> bool:
    """Make the dump folder ready for this launch. False: nothing is left to do, and nothing was changed.

    For rank 0 alone. `job` is resolved. Raises ConfigError where it does not fit what the folder holds.
    """
    folder = Path(job.job.dump_folder)
    own = find(job.checkpoint, folder / job.checkpoint.folder)
    if own is None:
        saved = read_config(folder)
        refuse_checkpoints_of_others(job, saved, folder)
        set_aside(folder, [folder / name for name in (*FILES, *folders(job, saved))])
        return True
    step = read_record(own)["step"]
    saved = read_config(folder, step)
    changed = [] if saved is None else changes(saved, job)
    if is_finished(job, step, changed):
        return lacks_its_last_figures(job, own, step)
    refuse_another_run(job, own, changed)
    if changed:
        logger.info(f"{folder} goes on from step {step} with other options: {'; '.join(map(str, changed))}")
    if complete_steps(own.parent)[-1] > step:
        go_back(folder, (own.parent, folder / TASKS_FOLDER), step)
    return True


def folders(job: JobConfig, saved: dict[str, Any] | None) -> set[str]:
    """Folders of this job and of the one before, which may have named them otherwise."""
    names = set()
    for option in FOLDERS:
        section, field = option.split(".")
        names |= {getattr(getattr(job, section), field), (saved or {}).get(section, {}).get(field)}
    return names - {None}


def is_finished(job: JobConfig, step: int, changed: list[Change]) -> bool:
    """Raises ConfigError where another run than the finished one is asked for."""
    folder, steps = job.job.dump_folder, job.training.steps
    if step > steps:
        raise ConfigError(
            f"training.steps = {steps}: {folder} has a checkpoint of step {step}; ask for more steps, go "
            "back with --checkpoint.load_step, or give another job.dump_folder"
        )
    if step < steps:
        return False
    if others_learnt := learnt(changed):
        others = "; ".join(map(str, others_learnt))
        raise ConfigError(
            f"{folder} is finished (step {step} of {steps}), with other options: {others}; "
            "give another job.dump_folder to train with them, or raise training.steps to go on with them"
        )
    done = f"{folder} is finished: step {step} of {steps}"
    logger.info(f"{done}; raise training.steps to go on, or give another job.dump_folder")
    return True


def lacks_its_last_figures(job: JobConfig, own: Path, step: int) -> bool:
    """Whether a finished run was never evaluated at its end: killed before, or not asked to be."""
    folder = Path(job.job.dump_folder)
    there = any(
        record["step"] == step and any(key.startswith(HELD_OUT) for key in record)
        for record in read_history(folder)
    )
    asked = bool(asdict(job.validation).get("tasks"))  # an option of the experiment, where it has tasks
    answered = (folder / TASKS_FOLDER / f"step-{step}" / TASKS_SUMMARY).is_file()
    wanted = (job.validation.enable and not there) or (asked and not answered)
    # A run cannot resume from weights alone (Checkpointer.load): `evaluate` looks at those.
    missing = wanted and not read_record(own)["model_only"]
    if missing:
        logger.info(f"{folder} has no held-out figures of step {step}: they are taken now")
    return missing


def refuse_another_run(job: JobConfig, own: Path, changed: list[Change]) -> None:
    """Raises ConfigError for options with which no run can resume from this checkpoint."""
    without = job.checkpoint.exclude_from_loading
    if "train_state" in without:
        raise ConfigError(
            f"checkpoint.exclude_from_loading = train_state: {own} is of this dump folder, and its steps "
            "would be counted from 0 again; give another job.dump_folder with "
            f"--checkpoint.initial_load_path {own}"
        )
    kept = {"model.name", "model.flavor"} | ({"optimizer.name"} - {f"{part}.name" for part in without})
    for change in changed:
        other_tokenizer = change.option == "model.tokenizer_path" and differ(change.before, change.now)
        if change.option in kept or other_tokenizer:
            made = f"{change.option} = {change.now}: {own} was made with {change.before}"
            raise ConfigError(f"{made}; keep it, or give another job.dump_folder")


def differ(before: str, now: str) -> bool:
    """Whether two tokenizers are there with different files. One that moved is the same."""
    if not (Path(before).exists() and Path(now).exists()):
        return False  # the loader compares what tokenizers do
    return find_file(Path(before)).read_bytes() != find_file(Path(now)).read_bytes()


def refuse_checkpoints_of_others(job: JobConfig, saved: dict[str, Any] | None, folder: Path) -> None:
    """Raises ConfigError where this folder has checkpoints that the run would not resume from: it must not
    share the folder with them.
    """
    for name in {
        job.checkpoint.folder,
        (saved or {}).get("checkpoint", {}).get("folder", job.checkpoint.folder),
    }:
        if steps := complete_steps(folder / name):
            raise ConfigError(
                f"{folder / name} has a checkpoint of step {steps[-1]}, and this run would begin at step 0: "
                f"go on from it with --checkpoint.enable --checkpoint.folder {name}, or give another "
                "job.dump_folder"
            )


def go_back(folder: Path, kept_by_step: Iterable[Path], step: int) -> None:
    """checkpoint.load_step: set aside what came after it, with its metrics, as another run's."""
    later = [
        parent / f"step-{number}"
        for parent in kept_by_step
        for number in complete_steps(parent)
        if number > step
    ]
    target = set_aside(folder, [*later, folder / WANDB_ID])
    if target is not None and (folder / HISTORY).is_file():
        shutil.copy2(folder / HISTORY, target)


def set_aside(folder: Path, paths: Iterable[Path]) -> Path | None:
    """Move what is there to previous/NUMBER/ and say so. Returns that folder."""
    target = folder / PREVIOUS / str(next_number(folder / PREVIOUS))
    moved = []
    for path in paths:
        if path.is_file() or path.is_dir() and any(path.iterdir()):
            to = target / path.relative_to(folder)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, to)
            moved.append(path.name)
        if path.name == TRACES:
            path.mkdir(exist_ok=True)  # nccl is configured to write there
    if not moved:
        return None
    logger.info(f"{folder}: what an earlier run wrote there is now in {target}: {', '.join(moved)}")
    return target
