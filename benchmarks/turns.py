"""Contestants that take turns: each in a process of its own, one at work at a time, so that a busy machine
hits all alike.

Of a turn: seconds, CPU seconds and peak memory, of the contestant's process and of the worker processes that
it names; and how many cores everybody else kept busy meanwhile. Needs Linux's /proc.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Protocol

import torch

Counts = dict[str, float]  # what a turn got done: images, megapixels, tokens ...
SETTLED_S = 0.3  # workers that use no CPU for so long have nothing more to do


class Contestant(Protocol):
    def prepare(self) -> None:
        """Bring it into a steady state, so that a turn gets nothing that was made before it."""

    def run(self) -> Counts: ...

    def workers(self) -> list[int]:
        """Process ids."""


class Skipped(Exception):
    """A contestant that cannot take part here, and why."""


class Seat:
    """A contestant in its process. Raises Skipped."""

    def __init__(self, make: Callable[[], Contestant]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["experiments.vlm.data.image"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make))
        self.process.start()
        theirs.close()
        self._answer()

    def turn(self) -> Counts:
        self.pipe.send("go")
        return self._answer()

    def close(self) -> None:
        self.pipe.close()
        self.process.join()

    def _answer(self) -> Counts:
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            raise RuntimeError("a contestant failed; its own message is above") from None
        if kind == "skipped":
            self.close()
            raise Skipped(value)
        return value


def _serve(pipe: Connection, make: Callable[[], Contestant]) -> None:
    torch.set_num_threads(1)
    try:
        contestant = make()
    except Skipped as skipped:
        pipe.send(("skipped", str(skipped)))
        return
    contestant.prepare()
    contestant.run()  # warm-up
    _settle(contestant.workers())
    pipe.send(("ready", {}))
    while _asked(pipe):
        pipe.send(("turn", _turn(contestant)))
    os._exit(0)  # workers end by themselves


def _asked(pipe: Connection) -> bool:
    try:
        return bool(pipe.recv())
    except EOFError:
        return False


def _turn(contestant: Contestant) -> Counts:
    contestant.prepare()
    workers = contestant.workers()
    started, cpu, all_cpu = time.perf_counter(), _cpu_seconds([os.getpid(), *workers]), _machine_seconds()
    counts = contestant.run()
    counts["seconds"] = time.perf_counter() - started
    counts["cpu_s"] = _cpu_seconds([os.getpid(), *workers]) - cpu
    counts["others"] = max(0.0, _machine_seconds() - all_cpu - counts["cpu_s"]) / counts["seconds"]
    _settle(workers)
    counts["process_mb"] = _peak_mb(os.getpid())
    counts["workers_mb"] = sum(map(_peak_mb, workers))
    return counts


def _settle(workers: list[int]) -> None:
    before = -1.0
    while workers and (now := _cpu_seconds(workers)) != before:
        before = now
        time.sleep(SETTLED_S)


def _cpu_seconds(processes: list[int]) -> float:
    """User and system, of all their threads; ticks of 10 ms."""
    ticks = 0
    for process in processes:
        with open(f"/proc/{process}/stat") as file:
            values = file.read().rpartition(")")[2].split()
        ticks += int(values[11]) + int(values[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _machine_seconds() -> float:
    """CPU time of all processes together, and what the host took away (steal)."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, soft_irq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def _peak_mb(process: int) -> float:
    """Largest resident memory so far. What processes share (torch's code, batches) counts in each."""
    with open(f"/proc/{process}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1e3
