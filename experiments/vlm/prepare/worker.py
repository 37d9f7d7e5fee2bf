"""The child process of a run on this machine."""

import contextlib
import fcntl
import multiprocessing
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from experiments.vlm.prepare.folder import Folder
from experiments.vlm.prepare.job import Job
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.pipeline import STAGES, run
from experiments.vlm.prepare.progress import Progress, Told
from experiments.vlm.prepare.stop import Stop, Stopped


@dataclass(frozen=True)
class Here:
    """The runner of a single process."""

    job: Job
    progress: Progress
    stop: Stop

    def run(self, stage: str, numbers: list[int]) -> None:
        STAGES[stage](self.job, numbers, self.progress, self.stop)


def work(options: Options, told: Told) -> None:
    stop = Stop()
    leave_parent(stop)
    prepare_process()
    try:
        job = Job.join(options)
        with only_run(job.folder, told, stop):
            run(job, Here(job, told, stop))
    except Stopped:
        pass
    except BaseException:
        told.crashed(traceback.format_exc())


def leave_parent(stop: Stop) -> None:
    """Neither its signals nor its end reach this process, but both are a wish to stop."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: stop.ask())
    threading.Thread(target=stop_with_parent, args=(stop,), daemon=True).start()
    # Whoever reads the parent's output must not wait for this process.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)


def stop_with_parent(stop: Stop) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    stop.ask()


def prepare_process() -> None:
    """Many connections; one thread an image."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    torch.set_num_threads(1)


@contextlib.contextmanager
def only_run(folder: Folder, progress: Progress, stop: Stop) -> Iterator[None]:
    """Raises Stopped. The lock ends with its process, however that ends."""
    with (folder.state / "lock").open("w") as file:
        waits = False
        while not locked(file.fileno()):
            if not waits:
                progress.note(f"waiting for another run on {folder.out}, or the last answers of one that was stopped")
            waits = True
            stop.check()
            time.sleep(0.05)
        yield


def locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
