"""Runs that end badly, in processes of their own, and what they left."""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.reference import fake_run
from torchtitan.components.sinks import read_history

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "tests.reference.fake_run"])


def _main(argv: list[str], environment: dict[str, str], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    sys.exit(fake_run.main(argv))


def train(folder: Path, *options: str, **environment: str) -> int:
    """The exit code of a run of the fake job (negative: the signal that killed it)."""
    argv = ["--job.dump_folder", str(folder), "--training.steps", "8", "--checkpoint.enable", "--checkpoint.interval", "2", *options]
    folder.mkdir(parents=True, exist_ok=True)
    process: BaseProcess = _context.Process(target=_main, args=(argv, environment, str(folder / "log.txt")))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """step -> (loss, gradient norm), every digit."""
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in read_history(folder) if "loss" in record}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").glob("*"))
