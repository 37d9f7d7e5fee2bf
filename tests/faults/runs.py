"""Runs that end badly, in processes of their own, and what they left."""

import contextlib
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.faults import accident
from tests.fork_server import Process
from tests.reference.small_run import job_of
from torchtitan.components.sinks import read_history
from torchtitan.config.parse import to_toml

JOB = {
    "training.local_batch_size": 2,
    "training.global_batch_size": -1,
    "training.steps": 8,
    "checkpoint.enable": True,
    "checkpoint.interval": 2,
}


@contextlib.contextmanager
def options_of(folder: Path) -> Iterator[list[str]]:
    """That make a run in `folder` one of JOB."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(to_toml(job_of(JOB, str(folder))))
        file.flush()
        yield ["--job.config_file", file.name]


def _main(argv: list[str], environment: dict[str, str], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    if limit := environment.get("FILE_LIMIT"):  # bytes of a file: what is longer ends as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    sys.exit(accident.main(argv))


def train(folder: Path, *options: str, **environment: str) -> int:
    """The exit code of a run of JOB with `options` (negative: the signal that killed it)."""
    folder.mkdir(parents=True, exist_ok=True)
    with options_of(folder) as job:
        arguments = [*job, *options], environment, str(folder / "log.txt")
        process = Process(target=_main, args=arguments)
        process.start()
        process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def losses(folder: Path) -> dict[int, tuple[float | None, ...]]:
    """step -> (loss, gradient norm, loss of each source, tokens so far), every digit. A step
    without documents of a source has no loss of it.
    """
    names = ("loss", "grad_norm", "loss/drawn", "loss/other", "tokens_seen")
    return {
        record["step"]: tuple(record.get(name) for name in names)
        for record in read_history(folder)
        if "loss" in record
    }


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").glob("*"))
