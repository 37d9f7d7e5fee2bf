"""Open shards of all sources of a process, opened before they are needed, and again after an outage.

use      read from a shard: opened if it is not, and waited for while its storage is away
ahead    open a shard that is read soon: in a thread, many at a time
"""

import contextlib
import errno
import os
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from experiments.vlm.data.formats.shard import Shard
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.client import Stopped
from experiments.vlm.data.storage.file_cache import NoRoom, holders, no_hurry
from experiments.vlm.data.storage.outages import Retry, is_away
from torchtitan.config.errors import DataError, UserError
from torchtitan.tools.logging import logger

T = TypeVar("T")
Key = tuple[int, str]  # source, path
Content = tuple[int, int]  # records of a shard and Shard.checksum
# (source, path); raises Rejected, and OSError of a storage that is away
OpenShard = Callable[[int, str], Shard]
OPENERS = 32  # threads that open shards ahead: nearly all of their time they wait for the storage
TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)


class Lease:
    """An open shard, closed when nobody holds this any more: the cache may let it go while a thread reads."""

    def __init__(self, shard: Shard):
        self.shard = shard

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # also while the interpreter ends
            self.shard.close()


class ShardCache:
    """Open shards of all sources, the longest unused let go. For all threads of a process.

    A shard that cannot be opened is remembered as well; where its storage is away, that is waited for.
    """

    def __init__(self, open_shard: OpenShard, capacity: int, retry: Retry):
        self.open_shard = open_shard
        self.capacity = capacity
        self.retry = retry
        self.kept: OrderedDict[Key, Future[Lease]] = OrderedDict()
        self.lock = threading.Lock()
        self.openers = ThreadPoolExecutor(OPENERS, "open")
        # (slot, source) -> by path what the shards held whose records that slot relies on
        self.in_hand: dict[tuple[int, int], dict[str, Content]] = {}
        holders.add(self)

    def use(self, source: int, path: str, work: Callable[[Shard], T]) -> T:
        """What `work` makes of the opened shard; again from opening it on while its storage is away.

        Raises Rejected and what `work` raises, StorageError, and DataError for a shard `in_hand` that holds
        something else now.
        """

        def attempt() -> T:
            lease = self._leased((source, path))
            try:
                return guarded(work, lease.shard)
            except OSError as error:
                self._forget((source, path))  # what was open may stay broken once the storage is back
                self._make_way(error)
                raise

        return self.retry.call(path, attempt)

    def ahead(self, source: int, path: str) -> None:
        """Open a shard that is used soon, in a thread that `use` waits for; unless its copy has no room."""
        future, is_new = self._future((source, path))
        if is_new:
            self.openers.submit(self._open, (source, path), future, partial(self._unhurried, source, path))

    def let_go(self) -> bool:
        """See Holder."""
        with self.lock:
            oldest = next((key for key, future in self.kept.items() if future.done()), None)
            return oldest is not None and self.kept.pop(oldest).done()

    def close(self) -> None:
        """Ends the threads that open shards and lets go of all; each is closed when its last lease ends."""
        self.openers.shutdown(cancel_futures=True)
        self.kept.clear()

    def _future(self, key: Key) -> "tuple[Future[Lease], bool]":
        """The shard, open or being opened; and whether it is for the caller to open it."""
        with self.lock:
            is_new = key not in self.kept
            future = self.kept.setdefault(key, Future())
            self.kept.move_to_end(key)
            while len(self.kept) > self.capacity:
                self.kept.popitem(last=False)
        return future, is_new

    def _leased(self, key: Key) -> Lease:
        future, is_new = self._future(key)
        if is_new:
            self._open(key, future, partial(self._opened, *key))
        try:
            return future.result()
        except Rejected as rejected:  # remembered: each is given one of its own, or tracebacks would grow
            raise Rejected(*rejected.args) from None
        except NoRoom:
            return self._leased(key)  # it was opened ahead, now it is needed

    def _unhurried(self, source: int, path: str) -> Shard:
        token = no_hurry.set(True)
        try:
            return self.retry.call(path, partial(self._opened, source, path))
        finally:
            no_hurry.reset(token)

    def _opened(self, source: int, path: str) -> Shard:
        try:
            shard = guarded(self.open_shard, source, path)
        except OSError as error:
            self._make_way(error)
            raise
        for (_, of), contents in list(self.in_hand.items()):
            before = contents.get(path) if of == source else None
            if before and before != (now := (len(shard), shard.checksum)):
                wrong = f"shard {path} has been written anew while it was read: {difference(before, now)}"
                raise DataError(f"{wrong}; change it back")
        return shard

    def _open(self, key: Key, future: "Future[Lease]", attempt: Callable[[], Shard]) -> None:
        try:
            future.set_result(Lease(attempt()))
        except BaseException as error:
            if not isinstance(error, Rejected):
                self._forget(key)  # away, or asked to end: nothing to remember
            future.set_exception(error)

    def _forget(self, key: Key) -> None:
        with self.lock:
            self.kept.pop(key, None)

    def _make_way(self, error: OSError) -> None:
        """Let all go that are open, where these are too many files: the next try may open one."""
        while error.errno in TOO_MANY_OPEN and self.let_go():
            pass


def difference(before: Content, now: Content) -> str:
    """Between what a shard held and holds, in words."""
    if before[0] == now[0]:
        return "it holds other records"
    return f"it held {before[0]:,} records and holds {now[0]:,}"


def guarded(call: Callable, *args):
    """`call(*args)`, with every error as Rejected: a record that a reader stumbles over stops no run.

    But an OSError of a storage that is away stays one, for Retry. Readers raise Rejected for what is wrong
    with a record, so whatever else they raise is their own fault and says so.
    """
    try:
        return call(*args)
    except (Rejected, MemoryError, UserError, Stopped, NoRoom):
        raise
    except OSError as error:
        if is_away(error):
            raise
        raise Rejected("shard_unreadable", f"{type(error).__name__}: {error}") from error
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} in {where.name}, {os.path.basename(where.filename)}:{where.lineno}"
        if kind not in _failures:
            _failures.add(kind)
            logger.exception(
                f"a reader failed ({kind}); it is counted as reader_failed, and further ones are not shown"
            )
        raise Rejected("reader_failed", f"{kind}: {error}") from error


_failures: set[str] = set()  # kinds that this process has logged
