"""One slot: a stream of planned rows, the same whoever runs it.

    draw      the mixture says which source, its reader gives the next good document, sample.py cuts it into pieces
    wait      up to `buffer` samples wait; of a document in pieces the first one waits, and the next one queues up again
              behind the others when it is taken. So pieces keep their order, and a book fills no row of rows
    plan      packing.py chooses who shares the row

State: the readers' positions, what the mixture gave, references to those that wait, counts. A resumed slot reads again
only what was waiting.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from experiments.vlm.data.control import CONTROLS
from experiments.vlm.data.image import ImagePlan
from experiments.vlm.data.mixture import Mixture
from experiments.vlm.data.packing import Budget, Waiting, choose, place
from experiments.vlm.data.reading import Record, Reference, ShardCache, SourceReader
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sample import Sample, plan_samples
from experiments.vlm.data.streams import Deal
from experiments.vlm.data.tally import Reject, Tally, check_bad_fraction
from torchtitan.components.tokenizer import Tokenizer

FIRST_LOOK = 64  # samples that wait at the first plan; it doubles up to the buffer, so that training starts early
ROWS_AHEAD = 2  # but at least so many slots' worth of tokens or patches wait, however small the samples


@dataclass(frozen=True)
class Planning:
    """What all slots of a run have in common. Picklable."""

    deals: tuple[Deal, ...]
    weights: tuple[float, ...]
    weight_by: Literal["samples", "tokens"]
    budget: Budget
    plan: ImagePlan
    long: Literal["split", "truncate", "drop"]
    buffer: int
    seed: int
    control: Literal["blanked", "shuffled"] | None = None
    max_bad_fraction: float = 1.0


@dataclass(frozen=True)
class Origin:
    source: str
    shard: str
    key: str
    caption: bool  # nothing of it is used when an image fails


@dataclass
class Entry:
    """A document of which at least one piece waits."""

    reference: Reference  # of the first of `pieces`
    origin: Origin
    pieces: list[Sample]  # those not delivered yet

    @property
    def head(self) -> Sample:
        return self.pieces[0]

    @property
    def tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.pieces)


@dataclass(frozen=True)
class Packed:
    """A sample with its place in the slot."""

    reference: Reference
    origin: Origin
    sample: Sample
    places: list[tuple[int, int]]  # (row, first patch) of each image


@dataclass
class SlotPlan:
    slot: int
    packed: list[Packed] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)  # met while reading ahead for this row
    position: str = ""  # JSON: the slot's position right after this plan


class Slot:
    def __init__(self, number: int, planning: Planning, tokenizer: Tokenizer, cache: ShardCache):
        self.number = number
        self.planning = planning
        self.tokenizer = tokenizer
        typical = planning.budget.seq_len / 4 if planning.weight_by == "tokens" else 1.0
        self.mixture = Mixture(planning.weights, planning.seed, number, typical)
        transform = CONTROLS[planning.control] if planning.control else None
        self.readers = [SourceReader(source, deal, number, cache, transform) for source, deal in enumerate(planning.deals)]
        self.records = [self._records(reader) for reader in self.readers]
        self.waiting: list[Entry] = []
        self.plans = 0
        self.tally = Tally()
        self.rejects: list[Reject] = []

    def plan(self) -> SlotPlan:
        """The next row; an empty one once everything is over. Raises DataError if a source is rotten."""
        self._refill()
        heads = [entry.head for entry in self.waiting]
        chosen: list[int] = []
        if heads:
            sizes = [[image.patches for image in sample.images] for sample in heads]
            patches = np.array([sample.patches for sample in heads])
            chosen = choose(Waiting(np.array([len(sample.tokens) for sample in heads]), patches, sizes), self.planning.budget)
        packed = self._take(chosen)
        self.plans += 1
        plan = SlotPlan(self.number, packed, self.rejects, self.position())
        self.rejects = []
        return plan

    def position(self) -> str:
        return json.dumps(
            {
                "plans": self.plans,
                "readers": [reader.position() for reader in self.readers],
                "mixture": self.mixture.position(),
                "waiting": [entry.reference for entry in self.waiting],
                "tally": self.tally.sources,
            }
        )

    def seek(self, state: dict[str, Any]) -> None:
        """Go on from a `position`. Samples that waited are read again; one that is not there any more is told and left out."""
        self.plans = state["plans"]
        self.mixture.seek(state["mixture"])
        self.tally = Tally(state["tally"])
        for reader, at in zip(self.readers, state["readers"], strict=True):
            reader.seek(at)
        self.records = [self._records(reader) for reader in self.readers]
        self.waiting = [entry for entry in map(self._reread, state["waiting"]) if entry is not None]

    def _records(self, reader: SourceReader) -> Iterator[tuple[Reference, Record]]:
        return reader.records(self._reject)

    def _reject(self, reject: Reject) -> None:
        self.tally.reject(reject)
        self.rejects.append(reject)
        check_bad_fraction(self.tally, self.planning.max_bad_fraction)

    def _reread(self, waited: list[int]) -> Entry | None:
        reference = Reference(*waited)
        reader = self.readers[reference.source]
        try:
            record = reader.read(reference)
        except Rejected as rejected:
            self._reject(reader.told(reference, rejected))
            return None
        pieces = self._pieces(record)[reference.piece :]
        return Entry(reference, self._origin(reference, record), pieces) if pieces else None

    def _refill(self) -> None:
        planning, budget = self.planning, self.planning.budget
        goal = min(planning.buffer, FIRST_LOOK << min(self.plans, 16))
        held = sum(entry.tokens for entry in self.waiting)
        tokens = sum(len(entry.head.tokens) for entry in self.waiting)
        patches = sum(entry.head.patches for entry in self.waiting)
        # The last condition bounds the memory where documents are long.
        while held < planning.buffer * budget.seq_len and (
            len(self.waiting) < goal or (tokens < ROWS_AHEAD * budget.seq_len and patches < ROWS_AHEAD * budget.patches)
        ):
            entry = self._draw()
            if entry is None:
                return
            self.waiting.append(entry)
            held += entry.tokens
            tokens += len(entry.head.tokens)
            patches += entry.head.patches

    def _draw(self) -> Entry | None:
        """The next document of the mixture; None when all sources are dry."""
        while (source := self.mixture.pick()) is not None:
            found = next(self.records[source], None)
            if found is None:
                self.mixture.dry[source] = True
                continue
            reference, record = found
            pieces = self._pieces(record)
            self._count(source, record, pieces)
            if pieces:
                self.readers[source].barren = 0
                entry = Entry(reference, self._origin(reference, record), pieces)
                self.mixture.give(source, entry.tokens if self.planning.weight_by == "tokens" else 1)
                return entry
        return None

    def _pieces(self, record: Record) -> list[Sample]:
        planning = self.planning
        return plan_samples(record.document, self.tokenizer, planning.plan, planning.budget, planning.long)

    def _count(self, source: int, record: Record, pieces: list[Sample]) -> None:
        name = self.planning.deals[source].name
        self.tally.count(name, "read")
        if not pieces:
            self.tally.count(name, "dropped")
        elif len(pieces) > 1:
            self.tally.count(name, "split")
        elif pieces[0].tokens[-1] != self.tokenizer.eos_id:
            self.tally.count(name, "truncated")

    def _take(self, chosen: list[int]) -> list[Packed]:
        """Remove the chosen heads; what is left of their documents queues up again."""
        taken = [self.waiting[i] for i in chosen]
        images = [image.patches for entry in taken for image in entry.head.images]
        places = iter(place(images, self.planning.budget) or [])
        packed = [Packed(entry.reference, entry.origin, entry.head, [next(places) for _ in entry.head.images]) for entry in taken]
        gone = set(chosen)
        self.waiting = [entry for i, entry in enumerate(self.waiting) if i not in gone]
        for entry in taken:
            if len(entry.pieces) > 1:
                reference = entry.reference._replace(piece=entry.reference.piece + 1)
                self.waiting.append(Entry(reference, entry.origin, entry.pieces[1:]))
        return packed

    def _origin(self, reference: Reference, record: Record) -> Origin:
        document = record.document
        return Origin(self.planning.deals[reference.source].name, record.shard, document.key, document.caption)
