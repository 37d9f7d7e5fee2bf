"""The model of a run that is over, for later use. Imports no torch."""

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model_config import image_plan
from experiments.vlm.processor import read_image_limits
from torchtitan.components.checkpoint_folder import RECORD, complete_steps, read_record
from torchtitan.components.saved_config import NEWEST
from torchtitan.config.errors import require
from torchtitan.config.parse import config_file, last_value, split_options
from torchtitan.tools.hub import get_it

# What else of a job decides what its model reads of a prompt, and in which precision.
READ_WITH = (
    "data.patch_size",
    "data.spatial_merge_size",
    "data.resize",
    "data.max_tiles_per_image",
    "training.seq_len",
    "training.mixed_precision_param",
)
SAID = 1024  # tokens besides the largest image
IMAGE_LIMITS = [
    f"data.{which}_{unit}_per_image" for which in ("max", "min") for unit in ("patches", "pixels", "tokens")
]


def with_saved(argv: Sequence[str]) -> list[str]:
    """The command line, with the configuration that the run saved where none is named."""
    folder = last_value(split_options(argv), "job.dump_folder")
    if config_file(argv) or folder is None or not (saved := Path(folder) / NEWEST).is_file():
        return list(argv)
    return ["--job.config_file", str(saved), *argv]


def use_hf_folder(job: VLMJobConfig, folder: str, argv: Sequence[str]) -> None:
    """Make a Hugging Face folder the source of the job's model, of the limits of its images, and of room for
    them, where `argv` sets none. Raises ConfigError.
    """
    missing = f"--hf = {folder}: no such folder (looked from {Path.cwd()}); {get_it(Path(folder))}"
    require(Path(folder).is_dir(), missing)
    job.model.flavor, job.model.tokenizer_path = "", folder
    job.checkpoint.initial_load_in_hf, job.checkpoint.initial_load_path = True, folder
    job.checkpoint.initial_load_encoder_path = job.checkpoint.initial_load_decoder_path = ""
    given = split_options(argv)
    if all(last_value(given, limit) is None for limit in IMAGE_LIMITS):
        read_image_limits(Path(folder), job)
    make_room(job, given)


def make_room(job: VLMJobConfig, given: Sequence[list[str]]) -> None:
    """Make room for the largest image of a model that cuts images into tiles, one a patch row, and for text
    about it, unless the `given` options set these.
    """
    plan = image_plan(job)
    if len(plan.largest) == 1:
        return
    rows = ("data.patches_per_row", "data.patch_rows")
    if all(last_value(given, option) is None for option in rows):
        job.data.patches_per_row, job.data.patch_rows = plan.most_cells, len(plan.largest)
    if last_value(given, "training.seq_len") is None:
        job.training.seq_len = max(job.training.seq_len, plan.most_tokens + SAID)


def read_with(job: VLMJobConfig) -> dict[str, Any]:
    """Options of a job on which answers of its model depend, by name."""
    return {name: attrgetter(name)(job) for name in (*IMAGE_LIMITS, *READ_WITH)}


def use_checkpoint(job: VLMJobConfig, name: str) -> Path:
    """The checkpoint `name`: step-N of the job, or a path; empty: the latest. The job's model is then that of
    the checkpoint, whatever the run once started from.

    Raises ConfigError where it is not there.
    """
    folder, c = Path(job.job.dump_folder) / job.checkpoint.folder, job.checkpoint
    steps = complete_steps(folder)
    require(bool(name or steps), f"no checkpoint in {folder}: train with checkpoint.enable, or name one")
    path = folder / (name or f"step-{steps[-1]}")
    path = path if (path / RECORD).is_file() else Path(name)
    known = ", ".join(f"step-{step}" for step in steps) or "none"
    require((path / RECORD).is_file(), f"--checkpoint {name}: no complete checkpoint; in {folder}: {known}")
    c.enable = c.initial_load_in_hf = False
    c.initial_load_encoder_path = c.initial_load_decoder_path = ""
    c.initial_load_path = str(path)
    if "model" in read_record(path):
        job.model.flavor = ""  # the checkpoint says it
    return path
