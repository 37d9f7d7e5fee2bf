"""A run on this machine, in a child process that outlives its parent by the answers on the wire.

The parent only shows how far the child is. When it is killed or interrupted, the child asks for nothing new, waits for what
is on the wire (at most --timeout_s), journals it and ends. So even a killed run fetched nothing in vain. The lock keeps the
next run waiting for that moment.
"""

import contextlib
import multiprocessing
from multiprocessing.connection import Connection

from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.progress import Progress, Told


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
        raise Crashed(f"the working process ended with exit code {child.exitcode}; the same command goes on from there")


def start_worker(options: Options, told: Told) -> None:
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
