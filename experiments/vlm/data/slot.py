"""One slot: a stream of planned rows, the same whichever process runs it.

    draw      the mixture says which source, its reader gives the next good document, sample.py its tokens
    wait      in the look-ahead, until a row is planned that the document, or a piece of it, goes into

State: the readers' positions, what the mixture gave, references to those that wait (with the token from which
on they do), counts. A resumed slot reads again only what was waiting.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from experiments.vlm.data.controls import CONTROLS
from experiments.vlm.data.good_sample import require_good_sample
from experiments.vlm.data.lookahead import LookAhead, Place, Queued, Taken
from experiments.vlm.data.rejects import Reject, Rejected
from experiments.vlm.data.report import Tally, check_bad_fraction
from experiments.vlm.data.sample import PlannedImage, Sample, make_sample
from experiments.vlm.data.setup import Setup
from experiments.vlm.data.sources.mixture import Mixture
from experiments.vlm.data.sources.reader import ReadDocument, Reference, SourceReader
from experiments.vlm.data.sources.shard_cache import ShardCache
from experiments.vlm.data.split import Splitter


@dataclass(frozen=True)
class Origin:
    """Where a sample came from, as reports name it."""

    source: str
    shard: str
    key: str
    caption: bool  # nothing of it is used when an image fails


@dataclass(frozen=True)
class Drawn:
    """A document that waits."""

    reference: Reference  # offset 0: the look-ahead knows how much of it has left
    origin: Origin
    sample: Sample
    truncated: bool = False


@dataclass(frozen=True)
class Packed:
    """A sample with its place in the slot."""

    reference: Reference
    origin: Origin
    sample: Sample
    places: list[Place]  # of each view of each image

    def placed(self) -> list[tuple[PlannedImage, list[Place]]]:
        """Each image with the places of its views."""
        places = iter(self.places)
        return [(image, [next(places) for _ in image.layout.views]) for image in self.sample.images]


@dataclass
class SlotPlan:
    """A row before its pixels: which samples it holds, and where their images go."""

    slot: int
    packed: list[Packed] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)  # met while reading ahead for this row
    position: dict[str, Any] = field(default_factory=dict)  # the slot's, right after this plan
    # this slot's share of the passes over each source so far
    epochs: dict[str, float] = field(default_factory=dict)


class Slot:
    """One slot of the global batch: what it has read, what waits, what it plans next."""

    def __init__(self, number: int, setup: Setup, cache: ShardCache):
        self.number = number
        self.check_source = partial(require_good_sample, setup, cache)
        self.setup = setup
        self.by_tokens = setup.data.weight_by == "tokens"
        typical = setup.budget.seq_len / 4 if self.by_tokens else 1.0
        self.mixture = Mixture(setup.weights, setup.seed, number, typical)
        control = CONTROLS[setup.control] if setup.control else None
        self.readers = [
            SourceReader(source, deal, number, cache, control) for source, deal in enumerate(setup.deals)
        ]
        self.records = [self._records(reader) for reader in self.readers]
        self.splitter = Splitter(setup.budget, setup.plan.merge_size)
        self.look_ahead: LookAhead[Drawn] = LookAhead(
            self.splitter, setup.data.packing_buffer_size, self.mixture, self.by_tokens
        )
        self.tally = Tally()
        self.rejects: list[Reject] = []

    def plan(self) -> SlotPlan:
        """The next row; empty once all is over. Raises DataError for a source of too much bad data."""
        self.look_ahead.refill(self.draw)
        packed = [self._packed(taken) for taken in self.look_ahead.take()]
        for reader, units in zip(self.readers, self._waiting(), strict=True):
            reader.hold(units)
        plan = SlotPlan(self.number, packed, self.rejects, self.position(), self.epochs())
        self.rejects = []
        return plan

    def position(self) -> dict[str, Any]:
        """Plain values of its own: what the slot does next changes none of them."""
        contents = [(reader.source, reader.contents()) for reader in self.readers]
        return {
            "plans": self.look_ahead.plans,
            "readers": [reader.position() for reader in self.readers],
            "mixture": self.mixture.position(),
            # Plain tuples: references with names take five times as long to come from a worker.
            "waiting": [(*entry.payload.reference[:-1], entry.start) for entry in self.look_ahead.entries],
            "contents": [[source, shard, *held] for source, of in contents for shard, held in of.items()],
            "tally": self.tally.snapshot(),
        }

    def epochs(self) -> dict[str, float]:
        """By source: see SourceReader.epochs. A document in pieces counts with its last."""
        waiting = zip(self.readers, self._waiting(), strict=True)
        return {reader.deal.name: reader.epochs(units) for reader, units in waiting}

    def _waiting(self) -> list[list[int]]:
        """By source: the unit of each document that waits."""
        units: list[list[int]] = [[] for _ in self.readers]
        for entry in self.look_ahead.entries:
            units[entry.payload.reference.source].append(entry.payload.reference.unit)
        return units

    def open_ahead(self, state: dict[str, Any] | None) -> None:
        """Let the shards be opened that this slot reads first, at a `position` or at the beginning."""
        places = state["readers"] if state else [reader.position() for reader in self.readers]
        waiting = state["waiting"] if state else []
        units = [(source, unit) for source, (unit, *_) in enumerate(places)]
        for source, unit in dict.fromkeys([*units, *((source, unit) for source, unit, *_ in waiting)]):
            self.readers[source].open_ahead(unit)

    def seek(self, state: dict[str, Any]) -> None:
        """Go on from a `position`. Samples that waited are read again; one that is gone is rejected."""
        self.look_ahead.plans = state["plans"]
        self.tally = Tally(state["tally"])
        for reader, at in zip(self.readers, state["readers"], strict=True):
            reader.seek(at)
        # A source that gave nothing good is asked again: it may have been mended.
        self.mixture.seek(state["mixture"], [reader.ended for reader in self.readers])
        self.records = [self._records(reader) for reader in self.readers]
        self.look_ahead.entries = list(filter(None, map(self._reread, state["waiting"])))

    def _records(self, reader: SourceReader) -> Iterator[tuple[Reference, ReadDocument]]:
        return reader.records(self._reject, self.check_source)

    def _reject(self, reject: Reject) -> None:
        self.tally.reject(reject)
        self.rejects.append(reject)
        check_bad_fraction(self.tally, self.setup.max_bad_fraction)

    def _reread(self, waited: list[int]) -> Queued[Drawn] | None:
        reference = Reference(*waited)
        reader = self.readers[reference.source]
        try:
            record = reader.read(reference._replace(offset=0))
        except Rejected as rejected:
            self._reject(reader.make_reject(reference, rejected))
            return None
        entry = self._queued(reference, record)
        return entry if entry and entry.length > 0 else None

    def draw(self) -> Queued[Drawn] | None:
        """The next document of the mixture; None when all sources are exhausted."""
        while (source := self.mixture.pick()) is not None:
            found = next(self.records[source], None)
            if found is None:
                self.mixture.exhausted[source] = True
                continue
            reference, record = found
            entry = self._queued(reference, record)
            self._count(source, record, entry)
            if entry is not None:
                self.readers[source].empty_units = 0
                self.mixture.give(source, entry.length if self.by_tokens else 1)
                return entry
        return None

    def _queued(self, reference: Reference, record: ReadDocument) -> Queued[Drawn] | None:
        """The document from reference.offset on; None if it is dropped for its length."""
        sample = make_sample(record.document, self.setup.tokenizer, self.setup.plan)
        long = self.setup.data.long_documents
        too_long = long != "split" and not self.splitter.holds(sample.outline)
        if too_long:
            if long == "drop":
                return None
            sample = sample.piece(0, self.splitter.longest(sample.outline))
        drawn = Drawn(reference._replace(offset=0), self._origin(reference, record), sample, too_long)
        return Queued(drawn, sample.outline, reference.source, self.splitter, reference.offset)

    def _packed(self, taken: Taken[Drawn]) -> Packed:
        drawn, start = taken.queued.payload, taken.queued.start
        if start == 0 and taken.end < drawn.sample.length:
            self.tally.count(drawn.origin.source, "split")
        return Packed(
            drawn.reference._replace(offset=start),
            drawn.origin,
            drawn.sample.piece(start, taken.end),
            taken.places,
        )

    def _count(self, source: int, record: ReadDocument, entry: Queued[Drawn] | None) -> None:
        name = self.setup.deals[source].name
        if entry is None:
            self._reject(Reject(name, record.shard, record.document.key, "too_long"))
            return
        self.tally.count(name, "read")
        if entry.payload.truncated:
            self.tally.count(name, "truncated")

    def _origin(self, reference: Reference, record: ReadDocument) -> Origin:
        document, source = record.document, self.setup.deals[reference.source].name
        return Origin(source, record.shard, document.key, document.caption)
