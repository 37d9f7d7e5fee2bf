"""How full slots of some size get on a data set: the packer itself, on the sizes of documents. No torch."""

import itertools
import signal
import time
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from experiments.vlm.data.lookahead import LookAhead, Queued, Taken
from experiments.vlm.data.packing import Budget
from experiments.vlm.data.sources.mixture import Mixture
from experiments.vlm.data.split import Outline, Splitter, outline_of

ROWS = 192  # that are planned, unless they take very many documents
DOCUMENTS = 20_000  # after which fewer rows do
LEAST_ROWS = 32
WARM_UP = 0.25  # share of the rows that are not counted: the look-ahead is not yet what it will be

SizedDocument = list[tuple[int, int]]  # (tokens, patches) of each part in order; patches 0: text


@dataclass(frozen=True)
class Stream:
    """Documents in the order in which the mixture gives them."""

    documents: list[SizedDocument]
    sources: list[int]  # of each document
    weights: tuple[float, ...] = (1.0,)
    by_tokens: bool = False  # the weights count tokens, else documents

    @cached_property
    def outlines(self) -> list[Outline]:
        """The outline of each document."""
        return [outline_of(document) for document in self.documents]

    @cached_property
    def ratio(self) -> float:
        """Patches per token, over all documents together."""
        tokens, patches = np.sum([part for document in self.documents for part in document], axis=0)
        return float(patches / tokens)


class Case(NamedTuple):
    """What is tried."""

    budget: Budget
    buffer: int


@dataclass(frozen=True)
class Prices:
    """FLOPs of the model's matrices, forward and backward, for a row of them, be it filled or padding.

    Attention is left out: padding has none, and what documents have goes with them into slots of any size.
    """

    token: float  # in the decoder
    patch: float  # in the encoder, with its share of a visual token in the projector


@dataclass(frozen=True)
class Occupancy:
    """How full slots of one budget were."""

    budget: Budget
    buffer: int
    rows: int  # that were counted
    tokens: float  # share of the tokens of a row that are not padding, in the long run
    patches: float
    plan_s: float  # a row
    images: float  # a row
    longest_wait: int  # rows

    def wasted(self, prices: Prices) -> float:
        """Share of the FLOPs of a slot that is spent on padding of either side."""
        token_side, patch_side = prices.token * self.budget.seq_len, prices.patch * self.budget.patches
        useful = token_side * self.tokens + patch_side * self.patches
        return 1 - useful / (token_side + patch_side)

    def cost(self, prices: Prices) -> float:
        """FLOPs for a useful token, with its share of the patches and of all padding."""
        slot = prices.token * self.budget.seq_len + prices.patch * self.budget.patches
        return slot / (self.tokens * self.budget.seq_len)


def simulate(stream: Stream, case: Case, merge: int, rows: int = ROWS) -> Occupancy:
    """Pack the documents in this order, from the first again where they do not last.

    The first rows do not count. What waits changes for long: rows get images while texts gather, say. In the
    long run they get what the data give: the fuller side stays as full, and the other follows from that.
    """
    budget, splitter, mixture = case.budget, Splitter(case.budget, merge), Mixture(stream.weights, 0, slot=0)
    look_ahead: LookAhead[int] = LookAhead(splitter, case.buffer, mixture, stream.by_tokens)
    documents = itertools.cycle(zip(stream.outlines, stream.sources, strict=True))
    drawn = 0

    def draw() -> Queued[int]:
        nonlocal drawn
        drawn += 1
        outline, source = next(documents)
        mixture.give(source, outline.length if stream.by_tokens else 1)
        return Queued(len(taken), outline, source, splitter)

    taken: list[list[Taken[int]]] = []
    spent_s, waits = 0.0, [0]
    while len(taken) < rows and (drawn < DOCUMENTS or len(taken) < LEAST_ROWS):
        look_ahead.refill(draw)
        started = time.process_time()
        taken.append(look_ahead.take())
        spent_s += time.process_time() - started
        waits += [len(taken) - 1 - piece.queued.payload for piece in taken[-1] if piece.queued.start == 0]
    counted = taken[int(len(taken) * WARM_UP) :]
    pieces = [piece.queued.way(piece.end) for row in counted for piece in row]
    tokens, patches = (
        sum(sizes) / len(counted) for sizes in zip(*((p.tokens, p.patches) for p in pieces), strict=True)
    )
    if tokens * budget.patches < patches * budget.seq_len:
        tokens = min(patches / stream.ratio, budget.seq_len)
    tokens = min(tokens, budget.patches / stream.ratio if stream.ratio else tokens)
    return Occupancy(
        budget=budget,
        buffer=case.buffer,
        rows=len(counted),
        tokens=tokens / budget.seq_len,
        patches=tokens * stream.ratio / budget.patches,
        plan_s=spent_s / len(taken),
        images=sum(len(piece.places) for row in counted for piece in row) / len(counted),
        longest_wait=max(waits),
    )


_kept: dict[str, tuple[Stream, int]] = {}  # of a process that simulates for another


def keep(stream: Stream, merge: int) -> None:
    """Keep the documents for each `simulate_kept` in this process. Ctrl-C is for the process that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _kept["documents"] = stream, merge


def simulate_kept(case: Case) -> Occupancy:
    """`simulate` on what is kept."""
    stream, merge = _kept["documents"]
    return simulate(stream, case, merge)
