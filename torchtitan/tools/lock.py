"""A lock that a process holds until it ends, however it ends: a killed one leaves none behind."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan.config.errors import UserError


def take_lock(path: Path) -> int | None:
    """A descriptor that holds the lock of this file, which is made; None where somebody else has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    except OSError:  # a file system without locks (some of clusters): nobody can know
        pass
    return held


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """While open, this process has the lock. Raises UserError with `refusal` where another one has it.

    The ranks of a run have it together: the first asks for all.
    """
    first = os.environ.get("RANK", "0") == "0"
    held = take_lock(path) if first else None
    if first and held is None:
        raise UserError(refusal)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Wait until no other process has the lock of this file, and hold it while open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
