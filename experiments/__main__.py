"""Starts a training job: `python -m experiments --job.config_file train_configs/vlm_debug.toml`.

What `torchtitan-vlm train` (in a checkout run_train.sh) becomes, or starts for each process.

The whole configuration is checked before torch is imported, so that a typo is reported in a fraction of a
second.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.vlm.check import check_vlm, choices
from experiments.vlm.config import VLMJobConfig
from torchtitan.config.errors import HangingRead, UserError
from torchtitan.config.help import FLAGS, Guide
from torchtitan.config.job import JobConfig
from torchtitan.config.parse import parse, to_toml
from torchtitan.tools.disk import is_full, require_writable
from torchtitan.tools.error_line import INTERRUPTED, report_line, reported
from torchtitan.tools.logging import init_logger
from torchtitan.tools.wandb_login import require_wandb


class Experiment(NamedTuple):
    """What `model.name` chooses: the job's class, its check, and where its TrainSpec is."""

    config_class: type[JobConfig]
    check: Callable[[Any, int], None]  # (job, world size); raises ConfigError
    spec: str  # "module:NAME" of its TrainSpec; imported after the check, since it imports torch


EXPERIMENTS = {"vlm": Experiment(VLMJobConfig, check_vlm, "experiments.vlm.spec:SPEC")}
USAGE = "[CONFIG_FILE=JOB] [NGPU=N] [LOG_RANK=0,1] [DRY_RUN=true] ./run_train.sh"
ABOUT = """Train the debug model on embedded data, or any job.

    [VARIABLE=value ...] ./run_train.sh [--section.field value ...]                 in a checkout
    [VARIABLE=value ...] torchtitan-vlm train [--section.field value ...]           where it is installed

    CONFIG_FILE   TOML job (train_configs/vlm_debug.toml); a --job.config_file among the options wins over it
    NGPU          processes on this machine (the visible GPUs; 1 on CPU)
    LOG_RANK      ranks whose lines are printed, for example 0,1 (0)
    DRY_RUN=true  check everything, build on the meta device, read one batch, print sizes, train nothing
    NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT         several machines: start this on each

A job file with a table [sweep] is many runs: what `torchtitan-vlm sweep` does, with all of its options.
"""
CONFIG_CLASSES = {name: experiment.config_class for name, experiment in EXPERIMENTS.items()}


def checked_job(argv: Sequence[str], world_size: int) -> JobConfig:
    """The job of a command line, every cross-check passed. Raises ConfigError; imports no torch."""
    job = parse(argv, CONFIG_CLASSES, Guide(USAGE, ABOUT, choices))
    EXPERIMENTS[job.model.name].check(job, world_size)
    return job


def ready_job(argv: Sequence[str], world_size: int) -> JobConfig:
    """The checked job of a run that is about to start: its dump folder takes files. Raises ConfigError."""
    job = checked_job(argv, world_size)
    if not job.job.dry_run:
        require_writable(Path(job.job.dump_folder), "job.dump_folder")
    if job.metrics.enable_wandb:
        require_wandb()
    return job


def load_spec(name: str) -> Any:
    """The TrainSpec of an experiment. Imports torch."""
    module, _, attribute = EXPERIMENTS[name].spec.partition(":")
    return getattr(importlib.import_module(module), attribute)


def main(argv: Sequence[str]) -> int:
    """Check, then train. Returns the exit code."""
    init_logger()
    return in_one_line(lambda: _check_and_train(argv))


def _check_and_train(argv: Sequence[str]) -> int:
    job = ready_job(argv, int(os.environ.get("WORLD_SIZE", "1")))
    if job.job.print_config and os.environ.get("RANK", "0") == "0":
        print(to_toml(job), flush=True)
    from torchtitan.train import main as run

    try:
        return run(job, load_spec(job.model.name))
    except OSError as error:
        if not is_full(error) or error.filename:
            raise
        raise OSError(error.errno, error.strerror, job.job.dump_folder) from error


def in_one_line(run: Callable[[], int]) -> int:
    """The exit code that `run` returns. What the user can mend or has interrupted is reported in one line."""
    try:
        return run()
    except (UserError, OSError) as error:
        code = reported(error)
        if isinstance(error, HangingRead):
            sys.stdout.flush()
            os._exit(code)
        return code
    except KeyboardInterrupt:
        report_line("interrupted at once: what was done since the last checkpoint is lost")
        return INTERRUPTED


if __name__ == "__main__":
    if not set(FLAGS).isdisjoint(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # --help | head ends without a word
    sys.exit(main(sys.argv[1:]))
