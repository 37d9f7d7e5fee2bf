"""Storage that is away is waited for: an outage is not bad data.

    not there    a name that the storage says it does not have          FileNotFoundError, a reject
    damaged      bytes that are not what their format says              a reject
    away         all else: EIO, timeouts, 5xx, 429, too many open       tried again with growing pauses, then
                 files, credentials                                     StorageError, which stops the run

A reader that waited goes on where it was, so an outage changes neither samples nor their order. Imports no
torch.
"""

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from experiments.vlm.data.storage.client import Stopped
from experiments.vlm.data.storage.file_cache import NoRoom
from torchtitan.config.errors import StorageError, UserError
from torchtitan.tools.disk import is_full
from torchtitan.tools.logging import logger

T = TypeVar("T")

# What a name, or a number out of damaged bytes, brings about whatever the storage does.
NOT_AWAY = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.EOVERFLOW,
}
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
GONE = (404, 410, 414)  # HTTP: not found, gone, and a name that is too long
FIRST_PAUSE_S = 0.5  # doubles with each try, half as long or as much again by chance
LONGEST_PAUSE_S = 30.0
WARN_EVERY_S = 60.0


class Away(OSError):
    """What the client of a remote storage raised, in its words; or a transfer that came short."""


def is_away(error: BaseException) -> bool:
    """Whether the storage failed, and a later try may not. An OSError without a number is about bytes."""
    if isinstance(error, (Away, TimeoutError, ConnectionError, PermissionError)):
        return True
    return isinstance(error, OSError) and error.errno is not None and error.errno not in NOT_AWAY


@contextmanager
def remote() -> Iterator[None]:
    """Errors of a remote storage's client, each of a kind of its own: Away, unless a name is not there."""
    try:
        yield
    except (UserError, Away, NoRoom):
        raise
    except Exception as error:
        # fsspec's client of HTTP says "not found" of whatever went wrong; what that was is its cause, and a
        # ValueError where the name cannot be one.
        is_named = isinstance(error, NOT_THERE)
        cause = error.__cause__ if is_named else error
        if is_full(error) or (is_named and (cause is None or isinstance(cause, (*NOT_THERE, ValueError)))):
            raise
        answer = getattr(cause, "response", cause)
        if getattr(answer, "status_code", getattr(answer, "status", None)) in GONE:
            raise FileNotFoundError(str(error)) from error
        raise Away(f"{type(cause).__name__}: {cause}") from error


def clock() -> float:
    """Seconds; tests have one of their own."""
    return time.monotonic()


class Retry:
    """Tries again for `timeout_s` seconds; one for each process, and for all its threads."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self.over = threading.Event()
        self.warned_at = float("-inf")
        self.lock = threading.Lock()

    def call(self, what: str, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, or raises where the storage is not to blame. `what`: a shard, for people.

        Raises StorageError where the storage stays away, or its disk is full.
        """
        since, pause_s = None, FIRST_PAUSE_S
        while True:
            outer = _inside.set(self)
            try:
                return attempt()
            except OSError as error:
                if is_full(error):
                    raise StorageError(f"{what}: {one_line(error)}") from error
                if not is_away(error):
                    raise
                since = clock() if since is None else since
                waited_s = clock() - since
                if waited_s >= self.timeout_s:
                    raise StorageError(self._given_up(what, error, waited_s)) from error
                self._warn(what, error, waited_s)
            finally:
                _inside.reset(outer)
            until_warning_s = self.warned_at + WARN_EVERY_S - clock()
            self.rest(
                min(pause_s * random.uniform(0.5, 1.5), self.timeout_s - waited_s, max(until_warning_s, 0.5))
            )
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def rest(self, seconds: float) -> None:
        """Raises Stopped once `end` was called."""
        if self.over.wait(seconds):
            raise Stopped

    def end(self) -> None:
        """Nobody waits any more: threads that do are let go."""
        self.over.set()

    def _warn(self, what: str, error: OSError, waited_s: float) -> None:
        with self.lock:
            if clock() - self.warned_at < WARN_EVERY_S:
                return
            self.warned_at = clock()
        logger.warning(
            f"{what}: the storage does not answer ({one_line(error)}); tried again for another "
            f"{self.timeout_s - waited_s:.0f} s (data.storage_timeout_s)"
        )

    def _given_up(self, what: str, error: OSError, waited_s: float) -> str:
        return (
            f"{what}: the storage has not answered for {waited_s:.0f} s (data.storage_timeout_s = "
            f"{self.timeout_s:g}): {one_line(error)}"
        )


_inside: ContextVar[Retry | None] = ContextVar("inside", default=None)


def retried(what: str, attempt: Callable[[], T]) -> T:
    """One piece of an attempt that is tried again, by itself: a record of twenty images would never be read
    whole from storage that fails one time in ten.
    """
    retry = _inside.get()
    return attempt() if retry is None else retry.call(what, attempt)


def one_line(error: BaseException) -> str:
    """An error in one line of bounded length."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, Away) else f"{type(error).__name__}: {text}"
