"""Which S and L waste least on a data set: measured on its documents' sizes, simulated with the packer itself.

L follows from S: S times the patches per token of the mixture, for a slot's two sides run full together only then. No pixel
is decoded; sizes come from headers and from the tokenizer.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from experiments.vlm.data.document import Image
from experiments.vlm.data.good_sample import Search
from experiments.vlm.data.packing import Budget
from experiments.vlm.data.producer import Setup
from experiments.vlm.data.reading import ShardCache
from experiments.vlm.data.sample import Atom, Sample, split
from experiments.vlm.data.slot import Slot
from experiments.vlm.data.window import Window

UNLIMITED = 1 << 40
WARM_UP = 0.25  # share of the rows that are not counted: the window is not yet what it will be
SLACKS = (1.0, 1.01, 1.02)  # a little too long a row often wastes less: texts that fill a slot alone leave others more patches

SizedDocument = list[tuple[int, int]]  # (tokens, patches) of each part in order; patches 0: text


@dataclass(frozen=True)
class Piece:
    """Implements window.Sized."""

    length: int
    image_patches: list[int]

    @cached_property
    def patches(self) -> int:
        return sum(self.image_patches)


@dataclass(frozen=True)
class Queue:
    """Implements window.Queued: the pieces of a document that wait."""

    pieces: list[Piece]
    entered: int  # row
    whole: bool = True  # no piece has left yet

    @property
    def head(self) -> Piece:
        return self.pieces[0]

    @cached_property
    def length(self) -> int:
        return sum(piece.length for piece in self.pieces)

    def rest(self) -> "Queue | None":
        return Queue(self.pieces[1:], self.entered, whole=False) if len(self.pieces) > 1 else None


@dataclass(frozen=True)
class Occupancy:
    budget: Budget
    buffer: int
    rows: int  # that were counted
    tokens: float  # share of the tokens of a row that are not padding
    patches: float
    plan_s: float  # a row
    images: float  # a row
    longest_wait: int  # rows

    @property
    def padding(self) -> float:
        """Mean of what both sides waste."""
        return 1 - (self.tokens + self.patches) / 2


def read_documents(setup: Setup, limit: int) -> list[SizedDocument]:
    """The sizes of the first `limit` documents of the mixture, as one slot would read them."""
    deals = tuple(replace(deal, slots=1) for deal in setup.planning.deals)
    planning = replace(setup.planning, deals=deals, budget=Budget(UNLIMITED, 1, UNLIMITED))
    cache = ShardCache(setup.open_shard, capacity=64)
    slot = Slot(0, planning, setup.tokenizer, cache, Search(planning, setup.tokenizer, cache).require)
    documents: list[SizedDocument] = []
    while len(documents) < limit and (entry := slot.draw()) is not None:
        documents.append(sizes_of(entry.head))
    return documents


def sizes_of(sample: Sample) -> SizedDocument:
    parts, cursor = [], 0
    for image in sample.images:
        visual = int((sample.tokens[image.start + 1 :] != sample.tokens[image.start + 1]).argmax())
        parts += [(image.start - cursor, 0), (visual + 2, image.patches)]
        cursor = image.start + visual + 2
    return [part for part in (*parts, (sample.length - cursor, 0)) if part[0]]


def patches_per_token(documents: Iterable[SizedDocument]) -> float:
    tokens, patches = np.sum([part for document in documents for part in document], axis=0)
    return float(patches / tokens)


def fitting_budget(seq_len: int, rows: int, ratio: float, merge: int, largest_image: int) -> Budget:
    """S with the L that `ratio` asks for: a multiple of merge squared, no shorter than the largest image."""
    per_row = round(seq_len * ratio / rows / merge**2) * merge**2
    return Budget(seq_len, rows, max(per_row, largest_image, merge**2))


def simulate(documents: Sequence[SizedDocument], budget: Budget, buffer: int, merge: int) -> Occupancy:
    """Pack the documents in this order. Neither the first rows count nor those that only empty the window."""
    window: Window[Queue] = Window(budget, buffer)
    left = list(reversed(documents))
    rows: list[list[Piece]] = []
    spent_s, waits = 0.0, [0]
    while True:
        window.refill(lambda: Queue(pieces_of(left.pop(), budget, merge), len(rows)) if left else None)
        if not left:
            break
        started = time.process_time()
        taken = window.take()
        spent_s += time.process_time() - started
        waits += [len(rows) - entry.entered for entry, _ in taken if entry.whole]
        rows.append([entry.head for entry, _ in taken])
    counted = rows[int(len(rows) * WARM_UP) :]
    count = max(1, len(counted))
    pieces = [piece for row in counted for piece in row]
    return Occupancy(
        budget=budget,
        buffer=buffer,
        rows=len(counted),
        tokens=sum(piece.length for piece in pieces) / (count * budget.seq_len),
        patches=sum(piece.patches for piece in pieces) / (count * budget.patches),
        plan_s=spent_s / max(1, len(rows)),
        images=sum(len(piece.image_patches) for piece in pieces) / count,
        longest_wait=max(waits),
    )


def pieces_of(document: SizedDocument, budget: Budget, merge: int) -> list[Piece]:
    images = [patches for _, patches in document if patches]
    tokens = sum(tokens for tokens, _ in document)
    if budget.holds(tokens, images):
        return [Piece(tokens, images)]
    # Ranges stand for token ids, and their lengths are all that matters.
    atoms = [Atom(range(tokens), (), Image(None, patches, 1) if patches else None, patches, 1) for tokens, patches in document]
    pieces = [
        ([len(atom.tokens) for atom in piece], [atom.patches for atom in piece if atom.image]) for piece in split(atoms, budget, merge)
    ]
    return [Piece(sum(lengths), images) for lengths, images in pieces]


def advise(documents: Sequence[SizedDocument], seq_len: int, rows: int, buffer: int, merge: int, largest_image: int) -> Occupancy:
    """The L with the least padding for this S, number of rows and look-ahead."""
    ratio = patches_per_token(documents)
    budgets = {fitting_budget(seq_len, rows, ratio * slack, merge, largest_image) for slack in SLACKS}
    return min((simulate(documents, budget, buffer, merge) for budget in sorted(budgets)), key=lambda seen: seen.padding)
