"""The working process of a run on this machine: started by start.py, which also says how it ends."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import BinaryIO

import torch

from experiments.vlm.data.storage.client import Stopped
from experiments.vlm.prepare.folder import Folder
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.progress import JsonProgress, StageProgress
from experiments.vlm.prepare.runner import STAGES, run
from experiments.vlm.prepare.shard_plan import PrepareJob
from experiments.vlm.prepare.stop import Stop
from torchtitan.tools.disk import allow_open_files, is_full, no_room
from torchtitan.tools.lock import take_lock


def main() -> None:
    """One run, with options from a line of standard input; progress goes out as JSON."""
    progress, stop = JsonProgress(own_stdout()), Stop()
    line = sys.stdin.readline()
    if not line:
        return  # what started this has ended already
    options = Options(**json.loads(line))
    threading.Thread(target=stop_at_end_of_input, args=(stop,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: stop.ask())
    prepare_process()
    try:
        job = PrepareJob.join(options)
        with only_run(job.folder, progress, stop):
            run(job, progress, lambda stage, numbers: STAGES[stage](job, numbers, progress, stop))
    except Stopped:
        pass
    except BaseException as error:
        why = traceback.format_exc()
        if isinstance(error, OSError) and is_full(error):
            why = f"{no_room(error)}, and the same command goes on"
        progress.send("crashed", why)


def own_stdout() -> BinaryIO:
    """Standard output for the messages alone: what a library prints must not come between them."""
    messages = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return messages  # type: ignore[return-value]


def stop_at_end_of_input(stop: Stop) -> None:
    """Stop when standard input ends: the parent holds its other end until it ends itself."""
    while sys.stdin.read(1):
        pass
    stop.ask()


def prepare_process() -> None:
    """Allow many connections; one thread an image."""
    allow_open_files()
    torch.set_num_threads(1)


@contextlib.contextmanager
def only_run(folder: Folder, progress: StageProgress, stop: Stop) -> Iterator[None]:
    """Wait for an earlier worker. Raises Stopped. The lock ends with its process, however that ends."""
    who = f"another run on {folder.out}, or the last answers of one that was stopped"
    waits = False
    while (lock := take_lock(folder.state / "lock")) is None:
        if not waits:
            progress.note(f"waiting for {who}")
        waits = True
        stop.check()
        time.sleep(0.05)
    try:
        yield
    finally:
        os.close(lock)


if __name__ == "__main__":
    main()
