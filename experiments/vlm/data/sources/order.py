"""In which order a slot reads a source: a pure function of the seed, so that neither ranks nor workers change
it.

    unit     (shard, part): part j of p takes the records j, j + p, ... of a shard, with p the smallest for
             which shards * p >= G, so that there is a unit for every slot
    dealing  the units of all epochs, each permuted anew, form one endless list; slot s takes s, s + G, ...
             Where that list ends, its last round and what is left over are dealt in pieces of units, so that
             slots run dry together
    order    the records of a unit are permuted inside windows of `shuffle_buffer`

A position in a source is two integers: how many units the slot has taken, and how many records of the current
one.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np

# without a good sample, and 16 rounds of the parts: then the whole source is asked for one
MOST_EMPTY_UNITS = 64
MOST_PIECES = 16  # of a unit of the last round: each is one more shard to open
KEPT_EPOCHS = 8  # whose orders of units are kept, of each source: slots are not at the same place


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) drawn from non-negative integers: the same on every machine and NumPy
    version.
    """
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

    @property
    def parts(self) -> int:
        """p, parts a shard."""
        return -(-self.slots // len(self.shards))

    @property
    def units(self) -> int:
        """Units of one epoch."""
        return len(self.shards) * self.parts

    @property
    def empty_units(self) -> int:
        """Units without a good sample after which a slot doubts its source. Parts may be empty.

        Without shuffling a slot has then met every unit that it will ever get.
        """
        met = 0 if self.shuffle else self.units // math.gcd(self.units, self.slots)
        return max(MOST_EMPTY_UNITS + 16 * self.parts, met)

    @property
    def key(self) -> tuple[int, int]:
        """Seeds the permutations of this source."""
        return self.seed, zlib.crc32(self.name.encode())

    @cached_property
    def last_round(self) -> tuple[int, int]:
        """(units that each slot takes whole, pieces of each unit after those); without end, or where the
        units come out even, there are no pieces.

        Of up to MOST_PIECES those that leave least of the slots dry: with k pieces the units that are left
        take ceil(units * k / G) / k rounds.
        """
        rounds, over = divmod((self.epochs or 0) * self.units, self.slots)
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
        epoch, place = divmod(index, self.units)
        if self.epochs is not None and epoch >= self.epochs:
            return None
        if self.shuffle:
            place = int(_epoch_orders(self.units, *self.key)(epoch)[place])
        shard, part = divmod(place, self.parts)
        return Unit(epoch, shard, part + piece * self.parts, self.parts * pieces)

    def epoch(self, slot: int, number: int) -> int:
        """The epoch of the slot's unit of that number, from 0; after the last unit the number of epochs."""
        unit = self.unit(slot, number)
        return unit.epoch if unit else self.epochs or 0

    def rounds(self, number: float) -> float:
        """How many whole units as many as `number` of a slot's are."""
        whole, pieces = self.last_round
        return number if self.epochs is None or number <= whole else whole + (number - whole) / pieces

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
