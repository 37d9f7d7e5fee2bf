"""One source, read by one slot: records in the order that order.py deals, bad ones logged and skipped.

While a unit is read, the shard of the next one is opened: a slot waits for storage only where opening a shard
takes longer than reading one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from experiments.vlm.data.document import Document
from experiments.vlm.data.formats.shard import Shard
from experiments.vlm.data.rejects import Reject, Rejected
from experiments.vlm.data.sources.order import Deal, Unit
from experiments.vlm.data.sources.shard_cache import ShardCache

T = TypeVar("T")


class Reference(NamedTuple):
    """Where a sample came from, in four integers: what a checkpoint keeps of a sample that waits."""

    source: int
    unit: int  # the slot's unit of that number
    record: int
    offset: int = 0  # tokens of it that were delivered


@dataclass(frozen=True)
class ReadDocument:
    """A document, the path of its shard, and what it lost."""

    document: Document
    shard: str
    lost: list[Rejected]  # images that the document goes without


class HeldUnit(NamedTuple):
    """A unit in hand: records of it wait, or it is being read, or another slot may have read its shard."""

    shard: int  # index in Deal.shards
    records: int  # of the unit, at least 1
    content: tuple[int, int] | None  # records of the shard and Shard.checksum; None where it cannot be opened


# a validation control: (document, its shard, its record)
Control = Callable[[Document, Shard, int], Document]


class SourceReader:
    """One slot's position in one source: `unit`, `place` in it, `empty_units` since a useful sample."""

    def __init__(self, source: int, deal: Deal, slot: int, cache: ShardCache, control: Control | None = None):
        self.source = source
        self.deal = deal
        self.slot = slot
        self.cache = cache
        self.control = control
        self.unit = 0
        self.place = 0
        self.empty_units = 0
        self._order: tuple[int, np.ndarray] | None = None  # of the current unit, by its number
        self._held: dict[int, HeldUnit] = {}  # by the unit's number

    @property
    def ended(self) -> bool:
        """Whether the last epoch is over."""
        return self.deal.unit(self.slot, self.unit) is None

    def open_ahead(self, number: int) -> None:
        """Let the shard of the slot's unit of that number be opened, if there is one."""
        if (unit := self.deal.unit(self.slot, number)) is not None:
            self.cache.ahead(self.source, self.deal.shards[unit.shard])

    def position(self) -> list[int]:
        """The unit's number, the place in its order, units in a row without a good sample."""
        return [self.unit, self.place, self.empty_units]

    def seek(self, position: list[int]) -> None:
        """Go on from a `position`."""
        self.unit, self.place, self.empty_units = position
        self._order = None

    def records(
        self, reject: Callable[[Reject], None], check_source: Callable[[int], None]
    ) -> Iterator[tuple[Reference, ReadDocument]]:
        """Good records from here on, until the last epoch is over, or where this slot's share never holds
        one.

        `check_source` is called with the source where there was none for long, or none at the end: it raises
        DataError if the source has none.
        """
        while (unit := self.deal.unit(self.slot, self.unit)) is not None:
            if self.empty_units > self.deal.empty_units:
                check_source(self.source)
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
                    reject(self.make_reject(reference, rejected))
                    continue
                for lost in record.lost:
                    reject(self._make_reject(unit, lost, record.document.key, lost.image or 0))
                yield reference, record
            self.unit, self.place = self.unit + 1, 0
            self.empty_units += 1  # reset by the slot when it uses a sample
        if self.empty_units > 1 or 0 < self.empty_units == self.unit:
            check_source(self.source)

    def read(self, reference: Reference) -> ReadDocument:
        """Raises Rejected."""
        unit = self._unit(reference.unit)
        document, lost = self._use(unit, lambda shard: self._read(shard, reference.record))
        return ReadDocument(document, self.deal.shards[unit.shard], lost)

    def _read(self, shard: Shard, number: int) -> tuple[Document, list[Rejected]]:
        document, lost = shard.read(number)
        return self.control(document, shard, number) if self.control else document, lost

    def _use(self, unit: Unit, work: Callable[[Shard], T]) -> T:
        """What `work` makes of the unit's shard. Raises Rejected."""
        return self.cache.use(self.source, self.deal.shards[unit.shard], work)

    def _unit(self, number: int) -> Unit:
        """One that this slot has begun."""
        unit = self.deal.unit(self.slot, number)
        assert unit is not None
        return unit

    def hold(self, waiting: Sequence[int]) -> None:
        """Learn what each unit in hand holds. `waiting`: the unit of each record that was read and not
        delivered yet.

        Where a shard is dealt in parts, that counts for all units of the present epoch and the one before,
        in which other slots may be: what this slot has read of a shard decides what it left to them.
        """
        needed = {*waiting, self.unit} if self.place else set(waiting)
        number = self.unit - 1
        while number >= 0 and (unit := self.deal.unit(self.slot, number)) is not None:
            if unit.parts == 1 or unit.epoch < self.deal.epoch(self.slot, self.unit) - 1:
                break
            needed.add(number)
            number -= 1
        self._held = {number: self._held.get(number) or self._look(number) for number in needed}
        contents = {self.deal.shards[shard]: content for shard, content in self.contents().items()}
        self.cache.in_hand[self.slot, self.source] = contents

    def contents(self) -> dict[int, tuple[int, int]]:
        """Records and checksum of the shards in hand, by index. What a run that goes on relies on."""
        return {held.shard: held.content for held in self._held.values() if held.content}

    def epochs(self, waiting: Sequence[int]) -> float:
        """This slot's share of the passes over the source: the units that it is done with among those of an
        epoch. `waiting`: as in `hold`, which was called with it.

        Over all slots the shares add up to how often the source was delivered, 1.0 after each unit once;
        rejected records count as delivered.
        """
        passes = {number: self.deal.passes(self.slot, number) for number in {*waiting, self.unit}}
        shares = {number: self.deal.passes(self.slot, number + 1) - passes[number] for number in passes}
        read = passes[self.unit]
        if self.place:
            read += shares[self.unit] * self.place / self._held[self.unit].records
        return read - sum(shares[number] / self._held[number].records for number in waiting)

    def _look(self, number: int) -> HeldUnit:
        """Into the slot's unit of that number."""
        unit = self._unit(number)
        try:
            content = self._use(unit, lambda shard: (len(shard), shard.checksum))
        except Rejected:
            return HeldUnit(unit.shard, 1, None)
        return HeldUnit(unit.shard, max(1, len(unit.records(content[0]))), content)

    def _records_of(self, unit: Unit, reject: Callable[[Reject], None]) -> np.ndarray:
        """The order of the current unit's records; none, and a reject, if its shard cannot be opened."""
        if self._order is None or self._order[0] != self.unit:
            first = self.place == 0 and unit.part == 0  # report what is wrong with a shard once an epoch
            try:
                wrong, records = self._use(unit, lambda shard: (shard.rejects, len(shard)))
                order = self.deal.order(unit, records)
            except Rejected as rejected:
                wrong, order = [rejected], np.empty(0, np.int64)
            for what in wrong if first else ():
                reject(self._make_reject(unit, what, "", image=None))
            self._order = self.unit, order
            self.open_ahead(self.unit + 1)
        return self._order[1]

    def make_reject(self, reference: Reference, rejected: Rejected) -> Reject:
        """The reject of a record, under its key where the shard still knows it."""
        unit = self._unit(reference.unit)
        try:
            key = self._use(unit, lambda shard: shard.key(reference.record))
        except Rejected:
            key = f"record {reference.record}"
        return self._make_reject(unit, rejected, key, image=None)

    def _make_reject(self, unit: Unit, rejected: Rejected, key: str, image: int | None) -> Reject:
        path = self.deal.shards[unit.shard]
        return Reject(self.deal.name, path, key, rejected.reason, rejected.detail, image)
