"""In which order a slot reads a source: a pure function of the seed, so that neither ranks nor workers change
it.

    unit     (shard, part): part j of p takes the records j, j + p, ... of a shard, with p the smallest for
             which shards * p >= G, so that there is a unit for every slot
    dealing  the units of all epochs, each permuted anew, form one endless list; slot s takes s, s + G, ...
    order    the records of a unit are permuted inside windows of `shuffle_buffer`

A position in a source is two integers: how many units the slot has taken, and how many records of the current
one.
"""

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# without a good sample, and 16 rounds of the parts: then the whole source is asked for one
MOST_EMPTY_UNITS = 64


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) drawn from non-negative integers: the same on every machine and NumPy
    version.
    """
    raw = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(count)
    return np.argsort(raw, kind="stable")


@dataclass(frozen=True)
class Unit:
    """A part of a shard in one epoch: what is dealt to slots."""

    epoch: int
    shard: int  # index in Deal.shards
    part: int


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

    def unit(self, slot: int, number: int) -> Unit | None:
        """The slot's unit of that number, from 0; None after the last epoch."""
        epoch, place = divmod(slot + number * self.slots, self.units)
        if self.epochs is not None and epoch >= self.epochs:
            return None
        shard, part = divmod(int(_epoch_order(self, epoch)[place]), self.parts)
        return Unit(epoch, shard, part)

    def order(self, unit: Unit, records: int) -> np.ndarray:
        """The indices of the unit's records in a shard of so many, in the order in which they are read."""
        indices = np.arange(unit.part, records, self.parts)
        if not self.shuffle:
            return indices
        place = unit.shard * self.parts + unit.part
        windows = [
            indices[start : start + self.shuffle_buffer]
            for start in range(0, len(indices), self.shuffle_buffer)
        ]
        shuffled = [
            window[permutation(len(window), *self.key, 1, unit.epoch, place, i)]
            for i, window in enumerate(windows)
        ]
        return np.concatenate(shuffled) if shuffled else indices


@lru_cache(maxsize=8)
def _epoch_order(deal: Deal, epoch: int) -> np.ndarray:
    return permutation(deal.units, *deal.key, 0, epoch) if deal.shuffle else np.arange(deal.units)
