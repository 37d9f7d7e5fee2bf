"""One source, read by one slot: records in the order that order.py deals, bad ones logged and skipped.

`ShardCache` keeps shards open for all slots of a process; `SourceReader` is one slot's position in one
source.
"""

import contextlib
import os
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from experiments.vlm.data.document import Document
from experiments.vlm.data.formats.shard import Shard
from experiments.vlm.data.rejects import Reject, Rejected
from experiments.vlm.data.sources.order import Deal, Unit
from experiments.vlm.data.storage.client import Stopped
from experiments.vlm.data.storage.patience import Patience, is_away
from torchtitan.config.errors import UserError
from torchtitan.tools.logging import logger

T = TypeVar("T")
Key = tuple[int, str]  # source, path


class Reference(NamedTuple):
    """Where a sample came from, in four integers: what a checkpoint keeps of a sample that waits."""

    source: int
    unit: int  # the slot's unit of that number
    record: int
    offset: int = 0  # tokens of it that were delivered


@dataclass(frozen=True)
class Record:
    """A document, the path of its shard, and what it lost."""

    document: Document
    shard: str
    lost: list[Rejected]  # images that the document goes without


class Lease:
    """An open shard, closed when nobody holds the lease any more: a thread may still read from one that the
    cache let go.
    """

    def __init__(self, shard: Shard):
        self.shard = shard

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # also while the interpreter ends
            self.shard.close()


class ShardCache:
    """Open shards of all sources, the longest unused let go. For all threads of a process.

    A shard that cannot be opened is remembered as well; where its storage is away, that is waited for.
    """

    def __init__(self, open_shard: Callable[[int, str], Shard], capacity: int, patience: Patience):
        self.open_shard = open_shard  # (source, path); raises Rejected, and OSError of a storage that is away
        self.capacity = capacity
        self.patience = patience
        self.kept: OrderedDict[Key, Future[Lease]] = OrderedDict()
        self.lock = threading.Lock()

    def use(self, source: int, path: str, work: Callable[[Shard], T]) -> T:
        """What `work` makes of the opened shard; again from opening it on while its storage is away.

        Raises Rejected and what `work` raises, StorageError.
        """

        def attempt() -> T:
            lease = self._leased((source, path))
            try:
                return guarded(work, lease.shard)
            except OSError:
                self._forget((source, path))  # what was open may stay broken once the storage is back
                raise

        return self.patience.insist(path, attempt)

    def close(self) -> None:
        self.kept.clear()

    def _leased(self, key: Key) -> Lease:
        with self.lock:
            future = self.kept.get(key)
            is_new = future is None
            future = self.kept.setdefault(key, Future())
            self.kept.move_to_end(key)
            while len(self.kept) > self.capacity:
                self.kept.popitem(last=False)
        if is_new:
            self._open(key, future)
        try:
            return future.result()
        except Rejected as rejected:  # remembered: each is given one of its own, or tracebacks would grow
            raise Rejected(*rejected.args) from None

    def _open(self, key: Key, future: "Future[Lease]") -> None:
        try:
            future.set_result(Lease(guarded(self.open_shard, *key)))
        except BaseException as error:
            if not isinstance(error, Rejected):
                self._forget(key, future)  # away, or asked to end: nothing to remember
            future.set_exception(error)

    def _forget(self, key: Key, future: "Future[Lease] | None" = None) -> None:
        with self.lock:
            if future is None or self.kept.get(key) is future:
                self.kept.pop(key, None)


def guarded(call: Callable, *args):
    """`call(*args)`, with every error as Rejected: a record that a reader stumbles over stops no run.

    But an OSError of a storage that is away stays one, for Patience. Readers raise Rejected for what is wrong
    with a record, so whatever else they raise is their own fault and says so.
    """
    try:
        return call(*args)
    except (Rejected, MemoryError, UserError, Stopped):
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


# a validation control: (document, its shard, its record)
Transform = Callable[[Document, Shard, int], Document]


class SourceReader:
    """One slot's position in one source.

    Position: `unit`, `place` in the unit's order, `empty_units` units since a useful sample.
    """

    def __init__(
        self, source: int, deal: Deal, slot: int, cache: ShardCache, transform: Transform | None = None
    ):
        self.source = source
        self.deal = deal
        self.slot = slot
        self.cache = cache
        self.transform = transform
        self.unit = 0
        self.place = 0
        self.empty_units = 0
        self._order: tuple[int, np.ndarray] | None = None  # of the current unit, by its number
        self._records_in: dict[int, int] = {}  # units of which records wait, and the current one

    @property
    def ended(self) -> bool:
        """Whether the last epoch is over."""
        return self.deal.unit(self.slot, self.unit) is None

    def position(self) -> list[int]:
        """The unit's number, the place in its order, units in a row without a good sample."""
        return [self.unit, self.place, self.empty_units]

    def seek(self, position: list[int]) -> None:
        """Go on from a `position`."""
        self.unit, self.place, self.empty_units = position
        self._order = None

    def records(
        self, reject: Callable[[Reject], None], doubt: Callable[[int], None]
    ) -> Iterator[tuple[Reference, Record]]:
        """Good records from here on, until the last epoch is over, or where this slot's share never holds
        one.

        `doubt` is called with the source where there was none for long: it raises DataError if it has none.
        """
        while (unit := self.deal.unit(self.slot, self.unit)) is not None:
            if self.empty_units > self.deal.empty_units:
                doubt(self.source)
                if self.deal.epochs is None and not self.deal.shuffle:
                    return
                self.empty_units = 0
            order = self._records_of(unit, reject)
            while self.place < len(order):
                reference = Reference(self.source, self.unit, int(order[self.place]))
                self.place += 1
                try:
                    record = self.read(reference)
                except Rejected as rejected:
                    reject(self.told(reference, rejected))
                    continue
                for lost in record.lost:
                    reject(self._told(unit, lost, record.document.key, lost.image or 0))
                yield reference, record
            self.unit, self.place = self.unit + 1, 0
            self.empty_units += 1  # reset by the slot when it uses a sample

    def read(self, reference: Reference) -> Record:
        """Raises Rejected."""
        unit = self.deal.unit(self.slot, reference.unit)
        assert unit is not None
        path = self.deal.shards[unit.shard]
        return self.cache.use(self.source, path, lambda shard: self._read(shard, path, reference.record))

    def _read(self, shard: Shard, path: str, number: int) -> Record:
        document, lost = shard.read(number)
        if self.transform is not None:
            document = self.transform(document, shard, number)
        return Record(document, path, lost)

    def epochs(self, waiting: Sequence[int]) -> float:
        """This slot's share of the passes over the source: the units that it is done with among those of an
        epoch.

        `waiting`: the unit of each record that was read and not delivered yet. Over all slots the shares add
        up to how often the source was delivered, 1.0 after each unit once; rejected records count as
        delivered.
        """
        needed = {*waiting, self.unit} if self.place else set(waiting)
        self._records_in = {
            number: self._records_in.get(number) or self._count_records(number) for number in needed
        }
        shares = {number: self.deal.rounds(number + 1) - self.deal.rounds(number) for number in needed}
        read = self.deal.rounds(self.unit)
        if self.place:
            read += shares[self.unit] * self.place / self._records_in[self.unit]
        unread = sum(shares[number] / self._records_in[number] for number in waiting)
        return (read - unread) / self.deal.units

    def _count_records(self, number: int) -> int:
        """How many the slot's unit of that number has; at least 1."""
        unit = self.deal.unit(self.slot, number)
        assert unit is not None
        try:
            records = self.cache.use(self.source, self.deal.shards[unit.shard], len)
        except Rejected:
            records = 0
        return max(1, len(unit.records(records)))

    def _records_of(self, unit: Unit, reject: Callable[[Reject], None]) -> np.ndarray:
        """The order of the current unit's records; none, and a reject, if its shard cannot be opened."""
        if self._order is None or self._order[0] != self.unit:
            first = self.place == 0 and unit.part == 0  # report what is wrong with a shard once an epoch
            try:
                path = self.deal.shards[unit.shard]
                wrong, records = self.cache.use(self.source, path, lambda shard: (shard.rejects, len(shard)))
                order = self.deal.order(unit, records)
            except Rejected as rejected:
                wrong, order = [rejected], np.empty(0, np.int64)
            for what in wrong if first else ():
                reject(self._told(unit, what, "", image=None))
            self._order = self.unit, order
        return self._order[1]

    def told(self, reference: Reference, rejected: Rejected) -> Reject:
        """That a record is not used, under its key where the shard still knows it."""
        unit = self.deal.unit(self.slot, reference.unit)
        assert unit is not None
        try:
            key = self.cache.use(
                self.source, self.deal.shards[unit.shard], lambda shard: shard.key(reference.record)
            )
        except Rejected:
            key = f"record {reference.record}"
        return self._told(unit, rejected, key, image=None)

    def _told(self, unit: Unit, rejected: Rejected, key: str, image: int | None) -> Reject:
        return Reject(
            self.deal.name, self.deal.shards[unit.shard], key, rejected.reason, rejected.detail, image
        )
