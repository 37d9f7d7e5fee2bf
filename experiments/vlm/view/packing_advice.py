"""Which S and L waste least on a data set: measured on its documents' sizes, simulated with the packer
itself.

L follows from S: S times the patches per token of the mixture, for a slot's two sides run full together only
then. Where images are large for such a row (one fills most of it), a longer row costs less: padding of
patches is cheaper than padding of tokens. No pixel is decoded; sizes come from headers and from the
tokenizer.
"""

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from experiments.vlm.data.good_sample import Search
from experiments.vlm.data.lookahead import LookAhead, Queued, Taken
from experiments.vlm.data.packing import Budget
from experiments.vlm.data.sample import Sample
from experiments.vlm.data.setup import Setup
from experiments.vlm.data.slot import Slot
from experiments.vlm.data.sources.mixture import Mixture
from experiments.vlm.data.sources.shard_cache import ShardCache
from experiments.vlm.data.split import Splitter, outline_of
from experiments.vlm.data.storage.patience import Patience

UNLIMITED = 1 << 40
WARM_UP = 0.25  # share of the rows that are not counted: the look-ahead is not yet what it will be
SLACKS = (1.0, 1.02, 1.1, 1.25, 1.5, 2.0)  # how much longer than the patches per token ask for L is tried

SizedDocument = list[tuple[int, int]]  # (tokens, patches) of each part in order; patches 0: text


@dataclass(frozen=True)
class Stream:
    """Documents in the order in which the mixture gives them."""

    documents: list[SizedDocument]
    sources: list[int]  # of each document
    weights: tuple[float, ...] = (1.0,)
    by_tokens: bool = False  # the weights count tokens, else documents


@dataclass(frozen=True)
class Occupancy:
    """How full slots of one budget were."""

    budget: Budget
    buffer: int
    rows: int  # that were counted
    tokens: float  # share of the tokens of a row that are not padding
    patches: float
    plan_s: float  # a row
    images: float  # a row
    longest_wait: int  # rows

    def cost(self, patch_cost: float) -> float:
        """What a useful token costs, padding and patches included; 1: a slot of tokens alone, full to the
        last.
        """
        return (
            (1 + patch_cost * self.budget.patches / self.budget.seq_len) / self.tokens
            if self.tokens
            else float("inf")
        )


def read_documents(setup: Setup, limit: int) -> Stream:
    """The sizes of the first `limit` documents of the mixture, as one slot would read them."""
    deals = tuple(replace(deal, slots=1) for deal in setup.settings.deals)
    settings = replace(setup.settings, deals=deals, budget=Budget(UNLIMITED, 1, UNLIMITED))
    cache = ShardCache(setup.open_shard, 64, Patience(setup.storage_timeout_s))
    slot = Slot(0, settings, setup.tokenizer, cache, Search(settings, setup.tokenizer, cache).require)
    read = list(itertools.islice(iter(slot.draw, None), limit))
    documents = [sizes_of(entry.payload.sample) for entry in read]
    return Stream(
        documents, [entry.source for entry in read], settings.weights, settings.weight_by == "tokens"
    )


def sizes_of(sample: Sample) -> SizedDocument:
    """A sample as integers: tokens and patches of its parts."""
    parts, cursor = [], 0
    for image in sample.images:
        parts += [(image.start - cursor, 0), (image.visual_tokens + 2, image.patches)]
        cursor = image.start + image.visual_tokens + 2
    return [part for part in (*parts, (sample.length - cursor, 0)) if part[0]]


def patches_per_token(documents: Iterable[SizedDocument]) -> float:
    """The ratio over all documents together."""
    tokens, patches = np.sum([part for document in documents for part in document], axis=0)
    return float(patches / tokens)


def fitting_budget(seq_len: int, rows: int, ratio: float, merge: int, largest_image: int) -> Budget:
    """S with the L that `ratio` asks for: a multiple of merge squared, no shorter than the largest image."""
    per_row = round(seq_len * ratio / rows / merge**2) * merge**2
    return Budget(seq_len, rows, max(per_row, largest_image, merge**2))


def simulate(stream: Stream, budget: Budget, buffer: int, merge: int) -> Occupancy:
    """Pack the documents in this order.

    Neither the first rows count nor those that only empty the look-ahead.
    """
    splitter, mixture = Splitter(budget, merge), Mixture(stream.weights, seed=0, slot=0)
    look_ahead: LookAhead[int] = LookAhead(splitter, buffer, mixture, stream.by_tokens)
    left = list(reversed(list(zip(stream.documents, stream.sources, strict=True))))

    def draw() -> Queued[int] | None:
        if not left:
            return None
        document, source = left.pop()
        outline = outline_of(document)
        mixture.give(source, outline.length if stream.by_tokens else 1)
        return Queued(len(rows), outline, source, splitter)

    rows: list[list[Taken[int]]] = []
    spent_s, waits = 0.0, [0]
    while True:
        look_ahead.refill(draw)
        if not left:
            break
        started = time.process_time()
        rows.append(look_ahead.take())
        spent_s += time.process_time() - started
        waits += [len(rows) - 1 - taken.queued.payload for taken in rows[-1] if taken.queued.start == 0]
    counted = rows[int(len(rows) * WARM_UP) :]
    count = max(1, len(counted))
    pieces = [taken.queued.way(taken.end) for row in counted for taken in row]
    return Occupancy(
        budget=budget,
        buffer=buffer,
        rows=len(counted),
        tokens=sum(piece.tokens for piece in pieces) / (count * budget.seq_len),
        patches=sum(piece.patches for piece in pieces) / (count * budget.patches),
        plan_s=spent_s / max(1, len(rows)),
        images=sum(len(taken.places) for row in counted for taken in row) / count,
        longest_wait=max(waits),
    )


def advise(
    stream: Stream, seq_len: int, rows: int, buffer: int, merge: int, largest_image: int, patch_cost: float
) -> Occupancy:
    """The L at which a token costs least for this S, number of rows and look-ahead.

    patch_cost: what a patch costs to encode, in tokens of the decoder.
    """
    ratio = patches_per_token(stream.documents)
    budgets = {fitting_budget(seq_len, rows, ratio * slack, merge, largest_image) for slack in SLACKS}
    seen = [simulate(stream, budget, buffer, merge) for budget in sorted(budgets)]
    return min(seen, key=lambda occupancy: occupancy.cost(patch_cost))
