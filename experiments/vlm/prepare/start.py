"""A run from its start: on a cluster, or on this machine in a working process of its own.

This process only shows how far the work is. The worker reads its options from its standard input, which then
stays open: when it ends, because this process was interrupted or killed, the worker asks for nothing new,
waits for what is on the wire (at most --timeout_s), journals it and ends. So even a killed run fetched
nothing in vain.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import experiments
from experiments.vlm.prepare.folder import read_json
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.progress import StageProgress
from experiments.vlm.prepare.shard_plan import PrepareJob
from torchtitan.config.errors import ConfigError


class Crashed(RuntimeError):
    """The worker ended before its work was done: its traceback, or its exit code."""


def prepare(options: Options, progress: StageProgress) -> dict:
    """Make the shards, or go on where an earlier call was stopped. The report. Raises ConfigError."""
    options = dataclasses.replace(
        options, out=absolute(options.out), image_folder=absolute(options.image_folder)
    )
    job = PrepareJob.begin(options)
    if options.ray_address:
        try:
            from experiments.vlm.prepare.cluster import run_on_cluster
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--ray_address needs Ray ({error}): pip install 'torchtitan-vlm[ray]'"
            ) from error
        run_on_cluster(options, progress)
    else:
        run_local(options, progress)
    return read_json(job.folder.report)


def absolute(path: str) -> str:
    """An absolute path, since other processes may work in other folders."""
    return path and str(Path(path).resolve())


def run_local(options: Options, progress: StageProgress) -> None:
    """Do all stages in a working process. Raises Crashed, or KeyboardInterrupt after the worker has ended."""
    worker = start_worker()
    assert worker.stdin and worker.stdout
    worker.stdin.write(json.dumps(dataclasses.asdict(options)).encode() + b"\n")
    worker.stdin.flush()
    try:
        follow(worker.stdout, progress)
    except KeyboardInterrupt:
        progress.note("stopping: waiting for the answers on the wire")
        worker.stdin.close()
        worker.wait()
        raise
    if code := worker.wait():
        raise Crashed(f"the working process ended with exit code {code}; the same command goes on from there")


def start_worker() -> subprocess.Popen:
    """Start the worker in a session of its own, so that no signal meant for this process reaches it."""
    path = [str(Path(experiments.__path__[0]).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.vlm.prepare.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a reader of this process's output must not wait for the worker's end
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        start_new_session=True,
    )


def follow(lines: Iterable[bytes], progress: StageProgress) -> None:
    """Shows what the worker sends (progress.JsonProgress), until it ends."""
    for line in lines:
        name, arguments = json.loads(line)
        if name == "crashed":
            raise Crashed(*arguments)
        getattr(progress, name)(*arguments)
