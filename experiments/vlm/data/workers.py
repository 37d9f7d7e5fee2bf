"""Worker processes: each runs some of a rank's slots and writes their rows into shared memory.

The trainer sends the numbers of a buffer and of a forward of the step; a worker answers with the SlotSteps
that it wrote there, those of its slots that are in that forward. One that is asked for the next before it has
finished plans ahead while its threads decode. It ends when its pipe closes, whatever happened to the trainer;
Ctrl-C and SIGTERM, which reach the whole process group, are the trainer's to act on.

Workers are forked by a server process that has imported torch (for its resize kernel: 2 s and half a GB, once
for all of them) and done nothing else. Forks of the trainer would copy a CUDA context, and the locks of its
threads as they are.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from experiments.vlm.data.producer import Producer, SlotStep
from experiments.vlm.data.setup import Setup
from experiments.vlm.data.shared_memory import Buffers, slot_views
from experiments.vlm.data.slot_state import SlotState
from torchtitan.config.errors import UserError

GRACE_S = 5.0  # for a worker to end by itself


@dataclass(frozen=True)
class Assignment:
    """What one worker runs. `places[i]`: which of the rank's slots that is; forward f has f * B and on."""

    slots: list[int]
    places: Sequence[int]
    states: dict[int, SlotState]


class Worker:
    """The trainer's end of one worker."""

    def __init__(self, number: int, setup: Setup, buffers: Buffers, assignment: Assignment):
        self.name = f"data worker {number} (slots {', '.join(map(str, assignment.slots))})"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["experiments.vlm.data.image"])
        self.pipe, theirs = context.Pipe()
        self.answers: deque[tuple[str, Any]] = deque()  # that have come and were not asked for yet
        arguments = theirs, setup, buffers, assignment
        self.process = context.Process(target=run, args=arguments, name=self.name, daemon=True)
        with _signals_blocked():
            self.process.start()
        theirs.close()

    def ask(self, buffer: int, forward: int) -> None:
        """Let it write its part of a forward of the step into that buffer; `answer` waits for it."""
        # If it is gone, `answer` says why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send((buffer, forward))

    def answer(self) -> list[SlotStep]:
        """Raises the worker's UserError, or RuntimeError where it failed or died."""
        if not self.answers:
            wait([self.pipe, self.process.sentinel])
            self.collect()
        died: tuple[str, Any] = "died", None
        kind, value = self.answers.popleft() if self.answers else died
        if kind == "user_error":
            raise value
        if kind == "failed":
            raise RuntimeError(f"{self.name} failed:\n{value}")
        if kind == "died":
            self.process.join(GRACE_S)
            raise RuntimeError(f"{self.name} {_death(self.process.exitcode)}")
        return value

    def collect(self) -> None:
        """Take what it has answered so far: a pipe holds little, and a worker waits while it is full."""
        with contextlib.suppress(EOFError, ConnectionResetError):
            while self.pipe.poll():
                self.answers.append(self.pipe.recv())

    def hang_up(self) -> None:
        """End the connection for both ends: the worker ends, and a thread in `answer` gets RuntimeError."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def close(self, deadline: float) -> None:
        """Let it end by itself until `deadline` (time.monotonic), then kill it."""
        self.pipe.close()
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started here never sees Ctrl-C or SIGTERM, from its first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def close_all(workers: list[Worker]) -> None:
    """Ends all workers within GRACE_S seconds."""
    for worker in workers:
        worker.pipe.close()
    deadline = time.monotonic() + GRACE_S
    for worker in workers:
        worker.close(deadline)


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = (
            ": out of memory? Lower data.num_workers, data.prefetch or data.packing_buffer_size"
            if name == "SIGKILL"
            else ""
        )
        return f"was killed by {name}{hint}"
    return f"ended with exit code {exitcode}; its own message is above"


def run(pipe: Connection, setup: Setup, buffers: Buffers, assignment: Assignment) -> None:
    """The worker process."""
    torch.set_num_threads(1)  # it works on several images at a time, not in one
    try:
        _serve(pipe, setup, buffers, assignment)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the trainer is gone
    except UserError as error:
        _send(pipe, "user_error", type(error)(str(error)))  # without the causes, which may not pickle
    except BaseException:
        _send(pipe, "failed", traceback.format_exc())
    # Without Python's own shutdown: threads that still decode would hold it up.
    os._exit(0)


def _serve(pipe: Connection, setup: Setup, buffers: Buffers, assignment: Assignment) -> None:
    producer = Producer(setup, assignment.slots, assignment.states)
    size, patch_rows = buffers.shape.slots, buffers.shape.patch_rows
    finish: Callable[[], list[SlotStep]] | None = None
    while True:
        asked = pipe.recv() if finish is None or pipe.poll() else None
        started = None
        if asked is not None:
            buffer, forward = asked
            which = [i for i, place in enumerate(assignment.places) if place // size == forward]
            rows = [assignment.places[number] % size for number in which]
            views = [slot_views(buffers.arrays[buffer], row, patch_rows) for row in rows]
            started = producer.start(which, views)
        if finish is not None:
            pipe.send(("step", finish()))
        finish = started


def _send(pipe: Connection, kind: str, message: object) -> None:
    with contextlib.suppress(OSError):
        pipe.send((kind, message))
