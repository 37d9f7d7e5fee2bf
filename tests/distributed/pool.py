"""Ranks for tests.

Each task gets fresh ranks: process groups, meshes and what PyTorch remembers of them do not outlive it. A
rank that fails ends the others, which would wait for it for ever.
"""

import logging
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.fork_server import Process


class RankFailed(AssertionError):
    """A rank raised or died; the message is its traceback."""


def _run(
    rank: int,
    ranks: int,
    store: str,
    timeout_s: float,
    answer: Connection,
    function: Callable,
    arguments: tuple,
) -> None:
    import torch

    torch.set_num_threads(1)
    # Comparing gathers what training never would.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        dist = torch.distributed
        dist.init_process_group(
            "gloo", f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s)
        )
        _tell(answer, True, function(*arguments))
        dist.destroy_process_group()
    except BaseException:
        _tell(answer, False, f"rank {rank} of {ranks}:\n{traceback.format_exc()}")
    os._exit(0)


def _tell(answer: Connection, good: bool, what: Any) -> None:
    # Not by `send`, which would hand over tensors as shared memory of a process that is about to end.
    answer.send_bytes(pickle.dumps((good, what)))


class Pool:
    def __init__(self, timeout_s: float = 240) -> None:
        """`timeout_s`: of a collective; a busy machine may need more."""
        self.timeout_s = timeout_s

    def run(self, ranks: int, function: Callable, *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returned on each of `ranks` ranks. Raises RankFailed."""
        with tempfile.TemporaryDirectory() as folder:
            answers, processes = [], []
            for rank in range(ranks):
                ours, theirs = multiprocessing.Pipe(duplex=False)
                store = os.path.join(folder, "store")
                processes.append(
                    Process(
                        target=_run,
                        args=(rank, ranks, store, self.timeout_s, theirs, function, arguments),
                        daemon=True,
                    )
                )
                processes[-1].start()
                theirs.close()
                answers.append(ours)
            try:
                return _collect(answers, self.timeout_s + 30)
            finally:
                for process in processes:
                    process.kill()
                    process.join()


def _collect(answers: list[Connection], patience_s: float) -> list[Any]:
    results: dict[Connection, Any] = {}
    while len(results) < len(answers):
        ready = wait([answer for answer in answers if answer not in results], timeout=patience_s)
        for answer in ready:
            try:
                good, results[answer] = pickle.loads(answer.recv_bytes())
            except EOFError:
                good, results[answer] = False, "a rank died without a word"
            if not good:
                raise RankFailed(results[answer])
        if not ready:
            raise RankFailed("no rank answered in time")
    return [results[answer] for answer in answers]
