"""A run on this machine, in a child process that outlives its parent by the answers on the wire.

The parent only shows how far the child is. When it is killed or interrupted, the child asks for nothing new, waits for what
is on the wire (at most --timeout_s), journals it and ends. So even a killed run fetched nothing in vain. The lock keeps the
next run waiting for that moment.
"""

import contextlib
import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection

from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.progress import Progress


class Crashed(RuntimeError):
    """The working process ended before its work; the message is its traceback, or its exit code."""


def run_local(options: Options, progress: Progress) -> None:
    """For a plan that is made. Raises Crashed, and KeyboardInterrupt when it was interrupted, after the child has ended."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=start_worker, args=(options, Told(sender)))
    child.start()
    sender.close()
    try:
        follow(receiver, progress)
        child.join()
    except KeyboardInterrupt:
        progress.note("stopping: waiting for the answers on the wire")
        child.terminate()
        child.join()
        raise
    if child.exitcode:
        raise Crashed(f"exit code {child.exitcode}")


def start_worker(options: Options, told: "Told") -> None:
    """In the child. What the work needs (torch among it) is imported there and not in the parent."""
    from experiments.vlm.prepare.worker import work

    work(options, told)


def follow(receiver: Connection, progress: Progress) -> None:
    """Shows what the child tells, until it ends."""
    with contextlib.suppress(EOFError):
        while True:
            name, arguments = receiver.recv()
            if name == "crashed":
                raise Crashed(*arguments)
            getattr(progress, name)(*arguments)


@dataclass(frozen=True)
class Told:
    """A Progress that sends everything to the parent. When the parent is gone nobody listens."""

    sender: Connection

    def stage(self, name: str, total: int) -> None:
        self.send("stage", name, total)

    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        self.send("advance", count, failed, size, before)

    def note(self, text: str) -> None:
        self.send("note", text)

    def crashed(self, text: str) -> None:
        self.send("crashed", text)

    def send(self, name: str, *arguments: object) -> None:
        with contextlib.suppress(OSError):
            self.sender.send((name, arguments))
