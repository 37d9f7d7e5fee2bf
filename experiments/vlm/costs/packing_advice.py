"""Which S and L waste least on a data set: the sizes of its documents, and a search with the packer itself.

    read      documents of the mixture, as many as the time allows: headers and texts, no pixel is decoded
    try       slots of some size are filled with them (packing_simulation.py), by several processes
    search    L for each S: around S times the patches per token of the data, for a slot's two sides run full
              together only there, then beyond the best on either side and closer around it

What is best is what takes the fewest FLOPs for a useful token, padding of both sides included: where the
encoder is cheap or images are large for a row, a longer row wastes less; where it is expensive, a shorter
one.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from itertools import islice, product, zip_longest
from typing import NamedTuple

from experiments.vlm.costs.packing_simulation import (
    Case,
    Occupancy,
    Prices,
    SizedDocument,
    Stream,
    keep,
    simulate,
    simulate_kept,
)
from experiments.vlm.data.packing import Budget
from experiments.vlm.data.sample import Sample
from experiments.vlm.data.setup import Setup
from experiments.vlm.data.slot import Slot
from experiments.vlm.data.sources.shard_cache import ShardCache
from experiments.vlm.data.storage.outages import Retry

UNLIMITED = 1 << 40
FACTORS = (1.0, 1.25, 0.85, 1.6, 2.0, 2.6)  # of the L that the patches per token ask for: tried first
IMAGES = (2, 3)  # and so many of the largest image, since a row that holds one more is another case
BEYOND = 1.25  # the next L where the best is the longest or shortest tried
NEAR = 1.02  # lengths that differ by less count as equal
ALIKE = 1.002  # nor are costs: some of that is chance

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Say nothing."""


class Deadline:
    """When to be done. `share`: of the time that is left."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.end = clock() + seconds

    def left_s(self) -> float:
        """Seconds; 0 where it is over."""
        return max(0.0, self.end - self.clock())

    def share(self, part: float) -> "Deadline":
        """An earlier deadline, after this part of the time that is left."""
        return Deadline(self.left_s() * part, self.clock)


def read_documents(setup: Setup, limit: int, deadline: Deadline | None = None, say: Say = silent) -> Stream:
    """The sizes of the first `limit` documents of the mixture, as one slot would read them; fewer where the
    time is over, but one.
    """
    deals = tuple(replace(deal, slots=1) for deal in setup.deals)
    setup = replace(setup, deals=deals, budget=Budget(UNLIMITED, 1, UNLIMITED))
    cache = ShardCache(setup.open_shard, 64, Retry(setup.data.storage_timeout_s))
    slot = Slot(0, setup, cache)
    documents: list[SizedDocument] = []
    sources: list[int] = []
    for entry in iter(slot.draw, None):
        documents.append(sizes_of(entry.payload.sample))
        sources.append(entry.source)
        say(f"reading: {len(documents):,} of up to {limit:,} documents")
        if len(documents) == limit or (deadline and not deadline.left_s()):
            break
    return Stream(documents, sources, setup.weights, slot.by_tokens)


def sizes_of(sample: Sample) -> SizedDocument:
    """A sample as integers: tokens and patches of its parts."""
    parts, cursor = [], 0
    for image in sample.images:
        parts += [(image.start - cursor, 0), (image.end - image.start, image.layout.cells)]
        cursor = image.end
    return [part for part in (*parts, (sample.length - cursor, 0)) if part[0]]


class Data(NamedTuple):
    """What is to be packed, and by which rules."""

    stream: Stream
    prices: Prices
    merge: int
    largest: int  # patches of the largest image that may come

    def cost(self, occupancy: Occupancy) -> float:
        """FLOPs for a useful token."""
        return occupancy.cost(self.prices)

    def length(self, patches: float) -> int:
        """The L for about so many: a multiple of merge squared, no shorter than the largest image."""
        square = self.merge**2
        return max(round(patches / square), math.ceil(self.largest / square), 1) * square


class Trials:
    """What was tried, each case once, by `processes` at a time, until the time is over."""

    def __init__(self, data: Data, deadline: Deadline, processes: int = 1, say: Say = silent):
        self.data = data
        self.deadline = deadline
        self.say = say
        self.seen: dict[Case, Occupancy] = {}
        self.processes = processes
        self.pool = start_pool(processes, data) if processes > 1 else None

    def run(self, cases: Iterable[Case]) -> bool:
        """Try those that were not, at least one; False where the time did not suffice."""
        new = [case for case in dict.fromkeys(cases) if case not in self.seen]
        for occupancy in self._occupancies(new):
            case = Case(occupancy.budget, occupancy.buffer)
            self.seen[case] = occupancy
            budget, flops = case.budget, self.data.cost(occupancy)
            what = f"S {budget.seq_len}, L {budget.patches_per_row}: {flops / 1e9:.4g} GFLOPs a useful token"
            self.say(f"trying: {len(self.seen)} sizes, {what}")
            if not self.deadline.left_s():
                break
        return all(case in self.seen for case in new)

    def _occupancies(self, cases: Sequence[Case]) -> Iterator[Occupancy]:
        if self.pool is None:
            yield from (simulate(self.data.stream, case, self.data.merge) for case in cases)
            return
        # As many as are tried at once: one that a process has taken is tried to its end, time or not.
        left, pool = iter(cases), self.pool
        running = {pool.submit(simulate_kept, case) for case in islice(left, self.processes)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
                running |= {pool.submit(simulate_kept, case) for case in islice(left, 1)}

    def of(self, case: Case) -> dict[int, float]:
        """L -> cost, of what differs from `case` in L alone."""
        return {
            tried.budget.patches_per_row: self.data.cost(occupancy)
            for tried, occupancy in self.seen.items()
            if with_length(tried, 0) == with_length(case, 0)
        }

    def close(self) -> None:
        """Ends the processes."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def start_pool(processes: int, data: Data) -> ProcessPoolExecutor:
    """Start processes that have the documents."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([simulate.__module__])
    return ProcessPoolExecutor(processes, context, keep, (data.stream, data.merge))


def with_length(case: Case, length: int) -> Case:
    """The case with another L."""
    return case._replace(budget=replace(case.budget, patches_per_row=length))


def search(
    trials: Trials,
    seq_lens: Sequence[int],
    rows: Sequence[int],
    buffers: Sequence[int],
    job: Case | None = None,
) -> list[Occupancy]:
    """The best L of each S, number of rows and look-ahead, and the job as it is first, if it is given.

    L is sought with the first of `buffers`; the others are tried with what was found.
    """
    data = trials.data
    kinds = [
        Case(Budget(seq_len, count, data.length(data.stream.ratio * seq_len / count)), buffers[0])
        for seq_len, count in product(seq_lens, rows)
    ]
    first = [job] if job else []
    trials.run(first)  # alone: of several at a time another may be the only one that is done in time
    wanted = {kind: first_lengths(kind.budget.patches_per_row, data) for kind in kinds}
    while wanted and trials.run([*first, *in_turn(wanted)]):
        wanted = {kind: lengths for kind in wanted if (lengths := next_lengths(trials.of(kind), data.length))}
    best = [
        with_length(kind, min(sorted(costs), key=costs.__getitem__))
        for kind in kinds
        if (costs := trials.of(kind))
    ]
    best = [case._replace(buffer=buffer) for case in best for buffer in buffers]
    if trials.deadline.left_s():
        trials.run(best)
    return [trials.seen[case] for case in dict.fromkeys([*first, *best]) if case in trials.seen]


def first_lengths(asked: int, data: Data) -> list[int]:
    """The lengths to try first: around what the patches per token ask for, and beyond, for large images."""
    images = [count * data.largest for count in IMAGES if count * data.largest > asked * min(FACTORS)]
    return list(dict.fromkeys(map(data.length, [*(asked * factor for factor in FACTORS), *images])))


def in_turn(wanted: Mapping[Case, Sequence[int]]) -> list[Case]:
    """The first length of each, then the second of each: where time is short, something is known of all."""
    rounds = zip_longest(*([with_length(kind, each) for each in lengths] for kind, lengths in wanted.items()))
    return [case for cases in rounds for case in cases if case]


def best_of(seen: Sequence[Occupancy], data: Data, seq_len: int, buffer: int) -> Occupancy:
    """The one that costs least; of those that cost as much, one with the job's own S and look-ahead."""
    least = min(map(data.cost, seen))
    alike = [occupancy for occupancy in seen if data.cost(occupancy) <= least * ALIKE]
    return min(alike, key=lambda o: (o.budget.seq_len != seq_len, o.buffer != buffer, data.cost(o)))


def next_lengths(costs: dict[int, float], length: Callable[[float], int]) -> list[int]:
    """Where to look next: beyond the best of what was tried while it is the last on a side, then halfway to
    its neighbours, until those are near. `length`: the L that may stand for so many patches.
    """
    tried = sorted(costs)
    place = min(range(len(tried)), key=lambda i: costs[tried[i]])
    best, neighbours = tried[place], tried[max(0, place - 1) : place + 2]
    beyond = [length(best * BEYOND**step) for step in (-1, 1) if best == tried[0 if step < 0 else -1]]
    between = [
        length(math.sqrt(best * each)) for each in neighbours if max(best, each) / min(best, each) > NEAR
    ]
    new = ([each for each in found if each not in costs] for found in (beyond, between))
    return next(filter(None, new), [])
