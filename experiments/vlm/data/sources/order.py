"""In which order a slot reads a source: a pure function of the seed, so that neither ranks nor workers change
it.

    unit     (shard, part): part j of p takes the records j, j + p, ... of a shard, with p the smallest for
             which shards * p >= G, so that there is a unit for every slot
    dealing  the units of all epochs, each permuted anew, form one endless list; slot s takes s, s + G, ...
             Where that list ends, its last round and what is left over are dealt in pieces of units, so that
             slots end together
    era      epochs over the same shards: new ones may join, from an epoch on that no slot has begun
    order    the records of a unit are permuted inside windows of `shuffle_buffer`

A position in a source is two integers: how many units the slot has taken, and how many records of the current
one.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

import numpy as np

# without a good sample, and 16 rounds of the parts: then the whole source is asked for one
MOST_EMPTY_UNITS = 64
MOST_PIECES = 16  # of a unit of the last round: each is one more shard to open
KEPT_EPOCHS = 8  # whose orders of units are kept, of each source: slots are not at the same place


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count), drawn from integers >= 0: the same on each machine, by any NumPy."""
    raw = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(count)
    return np.argsort(raw, kind="stable")


@dataclass(frozen=True)
class Unit:
    """A part of a shard in one epoch: what is dealt to slots. It has the records part, part + parts, ..."""

    epoch: int
    shard: int  # index in Deal.shards
    part: int
    parts: int

    def records(self, of: int) -> range:
        """Its records in a shard of so many."""
        return range(self.part, of, self.parts)


class Era(NamedTuple):
    """Epochs over the same shards."""

    epoch: int  # the first
    start: int  # its first unit in the endless list
    parts: int  # p
    units: int  # of an epoch


@dataclass(frozen=True)
class Deal:
    """How one source is dealt to G slots."""

    name: str
    shards: tuple[str, ...]
    slots: int  # G
    seed: int
    epochs: int | None  # None: without end
    shuffle: bool = True
    shuffle_buffer: int = 1024
    # (epoch, count): the first so many shards take part from that epoch on; empty: all do from the first
    joins: tuple[tuple[int, int], ...] = ()

    @cached_property
    def eras(self) -> list[Era]:
        """Eras with growing numbers of shards; one where none joined."""
        eras: list[Era] = []
        for epoch, shards in self.joins or ((0, len(self.shards)),):
            last, parts = eras[-1] if eras else Era(0, 0, 0, 0), -(-self.slots // shards)
            start = last.start + (epoch - last.epoch) * last.units
            eras.append(Era(epoch, start, parts, shards * parts))
        return eras

    @property
    def empty_units(self) -> int:
        """Units without a good sample after which a slot doubts its source. Parts may be empty.

        Without shuffling a slot has then met every unit that it will ever get.
        """
        last = self.eras[-1]
        met = 0 if self.shuffle else last.units // math.gcd(last.units, self.slots)
        return max(MOST_EMPTY_UNITS + 16 * last.parts, met)

    @property
    def key(self) -> tuple[int, int]:
        """Seeds the permutations of this source."""
        return self.seed, zlib.crc32(self.name.encode())

    @cached_property
    def last_round(self) -> tuple[int, int]:
        """(units that each slot takes whole, pieces of each unit after those); without end, or where the
        units come out even, there are no pieces.

        Pieces, up to MOST_PIECES, are as many as leave the fewest slots idle: with k pieces the units that
        are left take ceil(units * k / G) / k rounds.
        """
        if self.epochs is None:
            return 0, 1
        last = self.eras[-1]
        rounds, over = divmod(last.start + (self.epochs - last.epoch) * last.units, self.slots)
        if over == 0:
            return rounds, 1
        left = over + self.slots
        return rounds - 1, min(range(1, MOST_PIECES + 1), key=lambda k: (-(-left * k // self.slots) / k, k))

    def unit(self, slot: int, number: int) -> Unit | None:
        """The slot's unit of that number, from 0; None after the last epoch."""
        index, piece, pieces = slot + number * self.slots, 0, 1
        whole = self.last_round[0] * self.slots
        if self.epochs is not None and index >= whole:
            pieces = self.last_round[1]
            index, piece = divmod(index - whole, pieces)
            index += whole
        era = next(era for era in reversed(self.eras) if era.start <= index)
        passed, place = divmod(index - era.start, era.units)
        epoch = era.epoch + passed
        if self.epochs is not None and epoch >= self.epochs:
            return None
        if self.shuffle:
            place = int(_epoch_orders(era.units, *self.key)(epoch)[place])
        shard, part = divmod(place, era.parts)
        return Unit(epoch, shard, part + piece * era.parts, era.parts * pieces)

    def epoch(self, slot: int, number: int) -> int:
        """The epoch of the slot's unit of that number, from 0; after the last unit the number of epochs."""
        unit = self.unit(slot, number)
        return unit.epoch if unit else self.epochs or 0

    def passes(self, slot: int, number: int) -> float:
        """How much of a pass over the source the slot's first `number` units are; over all slots, epochs."""
        whole, pieces = self.last_round
        if self.epochs is not None and number > whole:
            count = whole + (number - whole) / pieces
        else:
            count = float(number)
        passes, end = 0.0, count
        for era in reversed(self.eras):
            first = max(0, -(-(era.start - slot) // self.slots))  # of the slot's units in that era
            passes += max(0.0, end - first) / era.units
            end = min(end, first)
        return passes

    def order(self, unit: Unit, records: int) -> np.ndarray:
        """The indices of the unit's records in a shard of so many, in the order in which they are read."""
        indices = np.array(unit.records(records), np.int64)
        if not self.shuffle:
            return indices
        place = unit.shard * unit.parts + unit.part
        windows = [
            indices[start : start + self.shuffle_buffer]
            for start in range(0, len(indices), self.shuffle_buffer)
        ]
        shuffled = [
            window[permutation(len(window), *self.key, 1, unit.epoch, place, i)]
            for i, window in enumerate(windows)
        ]
        return np.concatenate(shuffled) if shuffled else indices


@cache
def _epoch_orders(units: int, *key: int) -> Callable[[int], np.ndarray]:
    """Epoch -> the order of a source's units. By numbers alone: a Deal would be hashed by all its shards."""
    return lru_cache(maxsize=KEPT_EPOCHS)(lambda epoch: permutation(units, *key, 0, epoch))
