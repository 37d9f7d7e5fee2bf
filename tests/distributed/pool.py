"""Ranks for tests, started once: every layout runs inside them with a fresh process group.

Importing torch takes seconds a process, so ranks are forked from a server that has imported it, which itself never ran an
operation (a fork copies no threads). A rank that fails ends all of them, since the others would wait for it for ever; the next
task then starts new ones.
"""

import logging
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

RANKS = 8
TIMEOUT_S = 240.0
PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "tests.distributed.layouts",
]


class RankFailed(AssertionError):
    """A rank raised or died; the message is its traceback."""


def _serve(rank: int, requests: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # comparing gathers what training never would
    while True:
        function, arguments, ranks, store = requests.recv()
        try:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            dist = torch.distributed
            dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT_S))
            result = function(*arguments)
            dist.destroy_process_group()
        except BaseException:
            requests.send((False, f"rank {rank} of {ranks}:\n{traceback.format_exc()}"))
            os._exit(1)
        requests.send((True, result))


class Pool:
    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, ranks: int, function: Callable, *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returned on each of `ranks` ranks of a new world. Raises RankFailed."""
        while len(self._ranks) < ranks:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            chosen = self._ranks[:ranks]
            for _, requests in chosen:
                requests.send((function, arguments, ranks, os.path.join(folder, "store")))
            return self._collect([requests for _, requests in chosen])

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(len(self._ranks), theirs), daemon=True)
        process.start()
        theirs.close()
        self._ranks.append((process, ours))

    def _collect(self, pending: list[Connection]) -> list[Any]:
        order, results = list(pending), {}
        while len(results) < len(order):
            ready = wait([c for c in order if c not in results], timeout=TIMEOUT_S + 30)
            for connection in ready:
                try:
                    good, results[connection] = connection.recv()
                except EOFError:
                    good, results[connection] = False, "a rank died without a word"
                if not good:
                    self.close()
                    raise RankFailed(results[connection])
            if not ready:
                self.close()
                raise RankFailed("no rank answered in time")
        return [results[connection] for connection in order]

    def close(self) -> None:
        for process, connection in self._ranks:
            process.kill()
            connection.close()
        for process, _ in self._ranks:
            process.join()
        self._ranks = []
