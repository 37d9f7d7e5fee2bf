"""The options of a job beside those of a command: of the command line, and of the environment."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from experiments.__main__ import CONFIG_CLASSES
from experiments.vlm.config import VLMJobConfig
from torchtitan.config.errors import require
from torchtitan.config.parse import parse_script

DEFAULT_JOB = "train_configs/vlm_debug.toml"
ON, OFF = ("1", "true", "yes"), ("", "0", "false", "no")
Options = TypeVar("Options")


def parse_command(
    argv: Sequence[str], options_class: type[Options], about: str | None
) -> tuple[Options, VLMJobConfig]:
    """A command's own options, and the job. `about`: what its help says. Raises ConfigError."""
    options, job = parse_script(argv, options_class, CONFIG_CLASSES, about or "")
    assert isinstance(job, VLMJobConfig)
    return options, job


def with_variables(argv: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """What the variables ask of the job, and `argv`, which wins. Raises ConfigError."""
    dry_run = variables.get("DRY_RUN", "")
    known = dry_run.lower() in ON + OFF
    require(known, f"DRY_RUN = {dry_run}: expected true, yes or 1, or else false, no or 0")
    options = ["--job.config_file", variables.get("CONFIG_FILE") or DEFAULT_JOB, *argv]
    return [*options, "--job.dry_run"] if dry_run.lower() in ON else options


def number(variables: Mapping[str, str], name: str, least: int) -> int:
    """The whole number that a variable holds; `least` where it is not set. Raises ConfigError."""
    value = variables.get(name) or str(least)
    plain = value.isascii() and value.isdigit() and (value == "0" or value[0] != "0")
    require(plain and int(value) >= least, f"{name} = {value}: expected a whole number >= {least}")
    return int(value)
