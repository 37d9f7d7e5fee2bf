"""The look-ahead of a slot: documents that wait, and which of them, or which pieces, share the next row.

    wait     up to `size` documents, the oldest first
    choose   whole documents that fit, and first pieces of longer ones with images, by packing.py
    fill     the tokens that are left, to the last, with text of longer documents: a piece takes what is there

So a document that is too long is a cursor, cut only when a slot is planned. What is left of it queues up
again behind the others: pieces keep their order, and a book fills no row of rows while others wait.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from experiments.vlm.data.packing import Budget, Waiting, choose, place
from experiments.vlm.data.sources.mixture import Mixture
from experiments.vlm.data.split import Outline, Splitter

# documents that wait at the first plan; it doubles up to the size, so that training starts early
FIRST_LOOK = 64
ROWS_AHEAD = 2  # but at least so many slots' worth of tokens or patches wait, however small the documents
# Tokens that wait at most where slots are short and documents long; where slots are long, `size` of them.
MOST_TOKENS = 1 << 20
ENOUGH = 64  # a hole of less than S / ENOUGH stays rather than that a source gets ahead of its weight
WAYS = 4  # images that a first piece of a long document may end behind: what the packer may choose from

Place = tuple[int, int]  # (row, first patch)
Payload = TypeVar("Payload")


class Way(NamedTuple):
    """A piece that may be taken of a document: up to `end`."""

    end: int
    tokens: int
    patches: int


@dataclass(frozen=True, eq=False)
class Queued(Generic[Payload]):
    """A document of which the tokens from `start` on wait."""

    payload: Payload
    outline: Outline
    source: int
    splitter: Splitter
    start: int = 0

    @cached_property
    def length(self) -> int:
        """Tokens that wait."""
        return self.outline.length - self.start

    @cached_property
    def patches(self) -> int:
        """Patches that wait."""
        return self.outline.patches_of(self.start, self.outline.length)

    @cached_property
    def fits(self) -> bool:
        """Whether all that is left may go into one slot: see Splitter.fits."""
        return self.splitter.fits(self.outline, self.start)

    @cached_property
    def is_text(self) -> bool:
        """Longer than a slot, and text comes next: what fills the tokens that others leave."""
        return not self.fits and self.outline.patches_of(self.start, self.ways[0].end) == 0

    @cached_property
    def ways(self) -> list[Way]:
        """All of it where it fits; else a first piece of the size that others go well with, then shorter ones
        with images.
        """
        if self.fits:
            return [self.way(self.outline.length)]
        first = self.splitter.first(self.outline, self.start)
        image = self.outline.image_at(self.start)
        ends = [int(end) for end in self.outline.ends[image : image + WAYS] if end < first]
        return [self.way(end) for end in (first, *ends)]

    def way(self, end: int) -> Way:
        """The piece of what waits that ends at token `end`."""
        return Way(end, end - self.start, self.outline.patches_of(self.start, end))

    def images(self, end: int) -> list[int]:
        """Patches of each view of the piece's images, up to `end`."""
        return self.outline.images(self.start, end)


@dataclass(frozen=True)
class Taken(Generic[Payload]):
    """The piece [queued.start, end) of a document, and the place of each of its images."""

    queued: Queued[Payload]
    end: int
    places: list[Place]


class LookAhead(Generic[Payload]):
    """Documents that wait for a row of one slot. Payload: what the caller wants back with a piece."""

    def __init__(self, splitter: Splitter, size: int, mixture: Mixture, by_tokens: bool = False):
        """`mixture`: its weights hold for what leaves too; `by_tokens`: it counts tokens, else documents."""
        self.splitter = splitter
        self.budget = splitter.budget
        self.size = size
        self.mixture = mixture
        self.by_tokens = by_tokens
        self.entries: list[Queued[Payload]] = []  # oldest first
        self.plans = 0

    def refill(self, draw: Callable[[], Queued[Payload] | None]) -> None:
        """Let in what `draw` gives until enough wait, or until it has nothing more."""
        budget, entries = self.budget, self.entries
        goal = min(self.size, FIRST_LOOK << min(self.plans, 16))
        tokens = sum(entry.length for entry in entries)
        patches = sum(entry.patches for entry in entries)
        # The first condition bounds the memory where documents are long.
        while tokens < max(MOST_TOKENS, self.size * budget.seq_len) and (
            len(entries) < goal
            or (tokens < ROWS_AHEAD * budget.seq_len and patches < ROWS_AHEAD * budget.patches)
        ):
            entry = draw()
            if entry is None:
                return
            entries.append(entry)
            tokens += entry.length
            patches += entry.patches

    def take(self) -> list[Taken[Payload]]:
        """What shares the next row, in the order of waiting; empty where nothing waits."""
        self.plans += 1
        if not self.entries:
            return []
        entries, row = self.entries, _Row(self.entries, self.splitter, self.by_tokens, self._quota())
        row.choose()
        row.fill()
        ends = sorted(row.ends.items())
        placed = place(row.images, self.budget)
        assert placed is not None, "a row was planned that its images do not fit"
        places = iter(placed)
        taken = [Taken(entries[i], end, [next(places) for _ in entries[i].images(end)]) for i, end in ends]
        rests = [replace(entries[i], start=end) for i, end in ends if end < entries[i].outline.length]
        self.entries = [entry for i, entry in enumerate(entries) if i not in row.ends] + rests
        return taken

    def _quota(self) -> np.ndarray:
        """How much each source may still give the next row."""
        waiting = [0.0] * len(self.mixture.weights)
        for entry in self.entries:
            waiting[entry.source] += entry.length if self.by_tokens else entry.start == 0
        tokens = sum(entry.length for entry in self.entries)
        patches = sum(entry.patches for entry in self.entries)
        return self.mixture.quota(waiting, max(tokens / self.budget.seq_len, patches / self.budget.patches))


class _Row:
    """The next row while it is being planned. `ends[i]`: where the piece of entry i ends."""

    def __init__(self, entries: Sequence[Queued], splitter: Splitter, by_tokens: bool, quota: np.ndarray):
        self.entries = entries
        self.splitter = splitter
        self.budget = splitter.budget
        self.by_tokens = by_tokens
        self.quota = quota
        self.ends: dict[int, int] = {}
        self.tokens_left, self.patches_left = self.budget.seq_len, self.budget.patches
        self.texts = [i for i, entry in enumerate(entries) if entry.is_text]

    @property
    def images(self) -> list[int]:
        """Patches of each view of each image, in the order of the entries."""
        return [patches for i, end in sorted(self.ends.items()) for patches in self.entries[i].images(end)]

    def cost(self, i: int, end: int) -> float:
        """What a piece that ends there takes of its source's quota."""
        begun = self.ends.get(i, self.entries[i].start)
        return end - begun if self.by_tokens else float(begun == 0)

    def may_join(self, i: int) -> bool:
        entry = self.entries[i]
        return self.quota[entry.source] > 0 or self.cost(i, entry.start + 1) == 0

    def choose(self) -> None:
        """The oldest whose source may give, and those that go with it. Text that fills comes in last."""
        oldest = next((i for i in range(len(self.entries)) if self.may_join(i)), 0)
        filling = [i for i in self.texts if i != oldest]
        others = [i for i, entry in enumerate(self.entries) if i != oldest and not entry.is_text]
        # A text that goes in last needs room for its shortest piece; the oldest can be made longer by any
        # amount.
        reserved = self.splitter.shortest if filling and not self.entries[oldest].is_text else 0
        reserved = min(reserved, self.budget.seq_len - self.entries[oldest].ways[0].tokens)
        budget = replace(self.budget, seq_len=self.budget.seq_len - reserved)
        order = [oldest, *others]
        waiting, ends = self._waiting(order, budget)
        for row in choose(waiting, budget):
            self._take(*ends[row])

    def fill(self) -> None:
        """Make the longer ones of the chosen longer, then begin others: those whose source may give first."""
        longer = [i for i in sorted(self.ends) if self.ends[i] < self.entries[i].outline.length]
        others = [i for i, entry in enumerate(self.entries) if i not in self.ends and not entry.fits]
        others.sort(key=lambda i: not self.may_join(i))
        for i in (*longer, *others):
            if self.tokens_left == 0 or (
                self.tokens_left * ENOUGH < self.budget.seq_len and not self.may_join(i)
            ):
                return
            entry, end = self.entries[i], self.ends.get(i, self.entries[i].start)
            in_slot = tuple(self.images) if self.budget.patch_rows > 1 else ()
            reached = self.splitter.reach(
                entry.outline, end, self.tokens_left, self.patches_left, in_slot, entry.start
            )
            if reached > end:
                self._take(i, reached)

    def _take(self, i: int, end: int) -> None:
        entry, begun = self.entries[i], self.ends.get(i, self.entries[i].start)
        self.quota[entry.source] -= self.cost(i, end)
        self.tokens_left -= end - begun
        self.patches_left -= entry.outline.patches_of(begun, end)
        self.ends[i] = end

    def _waiting(self, order: Sequence[int], budget: Budget) -> tuple[Waiting, list[tuple[int, int]]]:
        """For the packer: the first way of each entry, then the others; and (entry, end) of each row."""
        order = [i for i in order if self.entries[i].ways[0].tokens <= budget.seq_len]
        rows = [(place, self.entries[i].ways[0]) for place, i in enumerate(order)]
        rows += [(place, way) for place, i in enumerate(order) for way in self.entries[i].ways[1:]]
        entries = [self.entries[order[place]] for place, _ in rows]
        ends = [(order[place], way.end) for place, way in rows]
        waiting = Waiting(
            tokens=np.array([way.tokens for _, way in rows]),
            patches=np.array([way.patches for _, way in rows]),
            images=[entry.images(way.end) for entry, (_, way) in zip(entries, rows, strict=True)]
            if budget.patch_rows > 1
            else (),
            owner=np.array([place for place, _ in rows]),
            group=np.array([entry.source for entry in entries]),
            cost=np.array([self.cost(i, end) for i, end in ends]),
            quota=self.quota,
            text_fills=bool(self.texts),
        )
        return waiting, ends
