"""Which waiting samples share the next slot: planned on integers, before any pixel exists.

In: tokens and patches of each sample that waits, and a slot's Budget. Out: which of them go in (`choose`),
and the patch row and first patch of each view of an image (`place`).

A slot is one budget with two sides, S tokens and `patch_rows` rows of L patches; a view never straddles two
rows. The oldest waiting sample always goes in, so none waits for more slots than there were samples before
it. The others are found by a few randomised tries, of which the fullest is kept:

    1. a base: the oldest, then samples in turn from two queues, those with more patches per token than the
       slot and those with fewer, whichever side lags behind. Both sides stay in step, and what keeps waiting
       stays like the stream itself. A long text throws a slot out of step: samples that make up for most of
       it follow, no second one
    2. stop while about two samples' room is left
    3. fill it with the best pair (or single) of all that fit, by brute force over thousands of pairs at once

One try is about 50 us in NumPy, and most slots need one or two. Everything here is a pure function of its
arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TRIES = 16
PATIENCE = 5  # tries in a row that find nothing better end the search
# Room left for the pair, in mean samples, by try: a wider hole has more pairs, a narrower one finer ones.
HOLES = (2.0, 1.5, 2.5, 1.0, 3.0)
CANDIDATES = 128  # of the samples that still fit, those that are paired with each other
FAR_BEHIND = 1.3  # how far what is left of a slot may differ from the whole of it in patches per token
LOST = 2.0  # beyond this, hardly any sample could make up for it
STEEPEST_OF = 32  # samples, among which the one is found that makes up for it
SKEW = 1.25  # how far a single slot may differ in patches per token from all that waits
GOOD_ENOUGH = 0.002  # stop trying when the wasted shares of both sides add up to less


@dataclass(frozen=True, order=True)
class Budget:
    """What one slot holds."""

    seq_len: int
    patch_rows: int
    patches_per_row: int

    @property
    def patches(self) -> int:
        """Patches that all its rows hold."""
        return self.patch_rows * self.patches_per_row

    def holds(self, tokens: int, images: Sequence[int]) -> bool:
        """Whether an empty slot has room for this many tokens and images of these many patches."""
        return tokens <= self.seq_len and place(images, self) is not None


@dataclass(frozen=True)
class Waiting:
    """What waits for a slot: a row for each sample, the oldest first, then rows for other ways to take one of
    them.

    A sample that costs joins only while its group (a source) has some of its quota left. The oldest always
    joins.
    """

    tokens: np.ndarray  # int64 [rows]
    patches: np.ndarray  # int64 [rows]
    # patches of each view of a row's images; needed where a slot has several patch rows
    images: Sequence[Sequence[int]] = ()
    # int64 [rows]: whose way to be taken a row is; None: each sample has one way
    owner: np.ndarray | None = None
    group: np.ndarray | None = None  # int64 [rows]
    cost: np.ndarray | None = None  # float64 [rows]
    quota: np.ndarray | None = None  # float64 [groups]; None: no limit
    text_fills: bool = False  # text will fill the tokens that are left, so that patches alone count


def place(images: Sequence[int], budget: Budget) -> list[tuple[int, int]] | None:
    """(row, first patch) for each view of so many patches; None if they do not fit.

    Images fill the one row in their order; several rows are filled with the largest first, each into the
    fullest row that has room.
    """
    room = [budget.patches_per_row] * budget.patch_rows
    order = (
        range(len(images)) if budget.patch_rows == 1 else sorted(range(len(images)), key=lambda i: -images[i])
    )
    places = [(0, 0)] * len(images)
    for i in order:
        rows = [row for row in range(budget.patch_rows) if room[row] >= images[i]]
        if not rows:
            return None
        row = min(rows, key=lambda row: room[row])
        places[i] = (row, budget.patches_per_row - room[row])
        room[row] -= images[i]
    return places


def choose(waiting: Waiting, budget: Budget) -> list[int]:
    """Rows, ascending, for the next slot, at most one of each sample, one of the oldest.

    Each alone must fit an empty slot.
    """
    tries = _Tries(waiting, budget)
    if waiting.tokens[: tries.samples].sum() <= budget.seq_len and _fits_rows(
        range(tries.samples), waiting, budget
    ):
        return list(range(tries.samples))
    best, least, found = [0], 2.0, 0
    for number in range(TRIES):
        chosen = tries.once(number)
        while not _fits_rows(chosen, waiting, budget):
            chosen.pop()
        waste = tries.waste(chosen)
        if waste < least:
            best, least, found = chosen, waste, number
        if least < tries.unreachable + GOOD_ENOUGH or number - found == PATIENCE:
            break
    return sorted(best)


def _fits_rows(chosen: Sequence[int], waiting: Waiting, budget: Budget) -> bool:
    if budget.patch_rows == 1:
        return int(waiting.patches[list(chosen)].sum()) <= budget.patches
    return place([patches for i in chosen for patches in waiting.images[i]], budget) is not None


class _Tries:
    """What the tries for one slot share."""

    def __init__(self, waiting: Waiting, budget: Budget):
        rows = np.arange(len(waiting.tokens))
        self.tokens, self.patches = waiting.tokens, waiting.patches
        self.owner = rows if waiting.owner is None else waiting.owner
        self.samples = int(np.count_nonzero(self.owner == rows))
        self.oldest = np.flatnonzero(self.owner == 0).tolist()  # the ways to take it, the usual one first
        self.S, self.P = budget.seq_len, budget.patches
        self.token_weight = 0.0 if waiting.text_fills else 1.0
        self.token_list, self.patch_list = self.tokens.tolist(), self.patches.tolist()
        self.ratios = (self.patches / self.tokens).tolist()
        self.group = np.zeros(len(rows), np.int64) if waiting.group is None else waiting.group
        self.cost = np.zeros(len(rows)) if waiting.cost is None else waiting.cost
        self.quota = np.full(self.group.max() + 1, np.inf) if waiting.quota is None else waiting.quota
        # What has to wait for its quota fills neither side of this slot.
        may = (self.owner == rows) & ((self.cost == 0) | (self.quota[self.group] > 0))
        may[0] = True
        self.mean = float(self.tokens[may].mean()), float(self.patches[may].mean())
        # Where a slot is far too large on one side for what waits (text alone, say), no try can fill that
        # side: what cannot be filled is left out when the sides are kept in step.
        ratio = self.mean[1] * self.S / (self.mean[0] * self.P)
        tokens_missing = max(0.0, 1 - SKEW / ratio) if ratio else 0.0
        patches_missing = max(0.0, 1 - SKEW * ratio)
        self.unreachable = patches_missing + self.token_weight * tokens_missing
        self.spare_tokens, self.spare_patches = self.S * tokens_missing, self.P * patches_missing
        # patches a token that slots can have
        self.slope = (self.P - self.spare_patches) / (self.S - self.spare_tokens)
        self.heavy = self.patches > self.slope * self.tokens
        self.random = np.random.Generator(np.random.PCG64(0))

    def once(self, number: int) -> list[int]:
        order = self._order(number)
        chosen, left = self._base(self.oldest[number % len(self.oldest)], order, HOLES[number % len(HOLES)])
        return chosen + self._pair(self._candidates(order, chosen, left), left)

    def waste(self, chosen: list[int]) -> float:
        tokens, patches = self.tokens[chosen].sum() / self.S, self.patches[chosen].sum() / self.P
        return float(self.token_weight * (1 - tokens) + 1 - patches)

    def _order(self, number: int) -> np.ndarray:
        """By age in the first try, later ever more at random."""
        ages = np.arange(1, self.samples)
        if number == 0:
            return ages
        spread = 0.5 if number < 6 else 2.0
        return ages[np.argsort(ages + self.random.random(len(ages)) * (spread * len(ages)), kind="stable")]

    def _base(self, oldest: int, order: np.ndarray, hole: float) -> tuple[list[int], "_Left"]:
        """The oldest, taken as that row, and more in `order`, kept in step, until `hole` mean samples fit on
        one of the sides.
        """
        heavy = self.heavy[order]
        light_queue, heavy_queue = order[~heavy][::-1].tolist(), order[heavy][::-1].tolist()
        chosen = [oldest]
        left = _Left(self.S - self.token_list[oldest], self.P - self.patch_list[oldest], self.quota.copy())
        while (
            (light_queue or heavy_queue)
            and left.tokens > hole * self.mean[0]
            and left.patches > hole * self.mean[1]
        ):
            behind = self._behind(left.tokens, left.patches)
            queue = (heavy_queue if behind >= 1 else light_queue) or light_queue or heavy_queue
            i = queue.pop(self._steepest(queue, behind))
            tokens, patches = self.token_list[i], self.patch_list[i]
            fits = tokens <= left.tokens and patches <= left.patches
            may = self.cost[i] == 0 or left.quota[self.group[i]] > 0
            if (
                may
                and fits
                and self._behind(left.tokens - tokens, left.patches - patches) <= max(LOST, behind)
            ):
                chosen.append(i)
                left.take(tokens, patches, int(self.group[i]), float(self.cost[i]))
        return chosen, left

    def _behind(self, tokens: int, patches: int) -> float:
        """How full the tokens are relative to the patches, among what can be filled, when this much is left;
        above 1 patches lag.
        """
        usable_tokens, usable_patches = tokens - self.spare_tokens, patches - self.spare_patches
        if usable_patches <= 0:
            return 0.0
        return usable_patches / (self.slope * usable_tokens) if usable_tokens > 0 else np.inf

    def _steepest(self, queue: list[int], behind: float) -> int:
        """Place in the queue of the sample to take: the next one, or while one side lags far behind (a long
        text has come in) the one among the next few that makes up for most of it, so that less extreme ones
        stay for slots that need no more.
        """
        if 1 / FAR_BEHIND <= behind <= FAR_BEHIND:
            return len(queue) - 1
        places = range(max(0, len(queue) - STEEPEST_OF), len(queue))
        return (max if behind > 1 else min)(places, key=lambda place: self.ratios[queue[place]])

    def _candidates(self, order: np.ndarray, chosen: list[int], left: "_Left") -> np.ndarray:
        """Rows of samples not chosen that fit what is left, in `order`; those of a sample stand together."""
        rank = np.empty(self.samples, np.int64)
        rank[order] = np.arange(len(order))
        free = np.ones(self.samples, bool)
        free[self.owner[chosen]] = False
        fits = (self.tokens <= left.tokens) & (self.patches <= left.patches)
        may = (self.cost == 0) | (left.quota[self.group] > 0)
        rows = np.flatnonzero(fits & may & free[self.owner])
        return rows[np.argsort(rank[self.owner[rows]], kind="stable")][:CANDIDATES]

    def _pair(self, candidates: np.ndarray, left: "_Left") -> list[int]:
        """The one or two candidates that fill most of what is left."""
        n = len(candidates)
        # float32 halves the memory that is swept and is exact here: sizes are whole and below 2^24. The last
        # row stands for none.
        tokens, patches = np.zeros(n + 1, np.float32), np.zeros(n + 1, np.float32)
        tokens[:n], patches[:n] = self.tokens[candidates], self.patches[candidates]
        owner = np.append(self.owner[candidates], -1)
        value = tokens * np.float32(self.token_weight / self.S) + patches / np.float32(self.P)
        values = value[:, None] + value
        values *= tokens[:, None] + tokens <= left.tokens
        values *= patches[:, None] + patches <= left.patches
        values[owner[:, None] == owner] = 0  # no sample is taken twice
        best = divmod(int(values.argmax()), n + 1)
        return [int(candidates[i]) for i in dict.fromkeys(best) if i < n]


@dataclass
class _Left:
    """What a slot that is being filled has left."""

    tokens: int
    patches: int
    quota: np.ndarray  # float64 [groups]

    def take(self, tokens: int, patches: int, group: int, cost: float) -> None:
        self.tokens -= tokens
        self.patches -= patches
        self.quota[group] -= cost
