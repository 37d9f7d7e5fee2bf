"""Which waiting samples share the next slot: planned on integers, before any pixel exists.

A slot is one budget with two sides, S tokens and `patch_rows` rows of L patches; an image never straddles two rows. The
oldest waiting sample always goes in, so none waits for more slots than there were samples before it. The others are found
by a few randomised tries, of which the fullest is kept:

    1. a base: the oldest, then samples in turn from two queues, those with more patches per token than the slot and those
       with fewer, whichever side lags behind. Both sides stay in step, and what keeps waiting stays like the stream itself.
       A long text throws a slot out of step: the samples that make up for most of it follow, and no second long text
    2. stop while about two samples' room is left
    3. fill it with the best pair (or single) of all that fit, by brute force over thousands of pairs at once

One try is about 50 us in NumPy, and most slots need one or two. Everything here is a pure function of its arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TRIES = 16
# Room left for the pair, in mean samples, by try: a wider hole has more pairs, a narrower one finer ones.
HOLES = (2.0, 1.5, 2.5, 1.0, 3.0)
CANDIDATES = 128  # of the samples that still fit, those that are paired with each other
FAR_BEHIND = 1.3  # how far what is left of a slot may differ from the whole of it in patches per token
LOST = 2.0  # and from where on hardly a sample could make up for it
STEEPEST_OF = 32  # samples, among which the one is found that makes up for it
SKEW = 1.25  # how far a single slot may differ in patches per token from all that waits
GOOD_ENOUGH = 0.002  # stop trying when the wasted shares of both sides add up to less


@dataclass(frozen=True, order=True)
class Budget:
    seq_len: int
    patch_rows: int
    patches_per_row: int

    @property
    def patches(self) -> int:
        return self.patch_rows * self.patches_per_row

    def holds(self, tokens: int, images: Sequence[int]) -> bool:
        """Whether an empty slot has room for this many tokens and images of these many patches."""
        return tokens <= self.seq_len and place(images, self) is not None


@dataclass(frozen=True)
class Waiting:
    """What waits for a slot, oldest first. `images[i]`: patches of each image of sample i; needed for several rows only."""

    tokens: np.ndarray  # int64 [n]
    patches: np.ndarray  # int64 [n]
    images: Sequence[Sequence[int]] = ()


def place(images: Sequence[int], budget: Budget) -> list[tuple[int, int]] | None:
    """(row, first patch) for each image of so many patches; None if they do not fit.

    Images fill the one row in their order; several rows are filled with the largest first, each into the fullest row that
    has room.
    """
    room = [budget.patches_per_row] * budget.patch_rows
    order = range(len(images)) if budget.patch_rows == 1 else sorted(range(len(images)), key=lambda i: -images[i])
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
    """Indices, ascending, of the samples for the next slot. Holds 0, the oldest; each alone must fit an empty slot."""
    n = len(waiting.tokens)
    if waiting.tokens.sum() <= budget.seq_len and _fits_rows(range(n), waiting, budget):
        return list(range(n))
    tries = _Tries(waiting, budget)
    best, least = [0], 2.0
    for number in range(TRIES):
        chosen = tries.once(number)
        while not _fits_rows(chosen, waiting, budget):
            chosen.pop()
        waste = tries.waste(chosen)
        if waste < least:
            best, least = chosen, waste
        if least < tries.unreachable + GOOD_ENOUGH:
            break
    return sorted(best)


def _fits_rows(chosen: Sequence[int], waiting: Waiting, budget: Budget) -> bool:
    if budget.patch_rows == 1:
        return int(waiting.patches[list(chosen)].sum()) <= budget.patches
    return place([patches for i in chosen for patches in waiting.images[i]], budget) is not None


class _Tries:
    """What the tries for one slot share."""

    def __init__(self, waiting: Waiting, budget: Budget):
        self.tokens, self.patches = waiting.tokens, waiting.patches
        self.S, self.P = budget.seq_len, budget.patches
        self.token_list, self.patch_list = self.tokens.tolist(), self.patches.tolist()
        self.ratios = (self.patches / self.tokens).tolist()
        self.mean = float(self.tokens.mean()), float(self.patches.mean())
        self.heavy = self.patches * self.S > self.tokens * self.P
        # Where a slot is far too large on one side for what waits (text alone, say), no try can fill that side.
        ratio = self.mean[1] * self.S / (self.mean[0] * self.P)
        self.unreachable = max(0.0, 1 - SKEW * ratio, 1 - SKEW / ratio if ratio else 0.0)
        self.random = np.random.Generator(np.random.PCG64(0))

    def once(self, number: int) -> list[int]:
        order = self._order(number)
        chosen, tokens_left, patches_left = self._base(order, HOLES[number % len(HOLES)])
        fits = (self.tokens <= tokens_left) & (self.patches <= patches_left)
        fits[chosen] = False
        return chosen + self._pair(order[fits[order]][:CANDIDATES], tokens_left, patches_left)

    def waste(self, chosen: list[int]) -> float:
        return float(2 - self.tokens[chosen].sum() / self.S - self.patches[chosen].sum() / self.P)

    def _order(self, number: int) -> np.ndarray:
        """By age in the first try, later ever more at random."""
        ages = np.arange(1, len(self.token_list))
        if number == 0:
            return ages
        spread = 0.5 if number < 6 else 2.0
        return ages[np.argsort(ages + self.random.random(len(ages)) * (spread * len(ages)), kind="stable")]

    def _base(self, order: np.ndarray, hole: float) -> tuple[list[int], int, int]:
        """The oldest and more in `order`, kept in step, until `hole` mean samples would still fit on one of the sides."""
        heavy = self.heavy[order]
        light_queue, heavy_queue = order[~heavy][::-1].tolist(), order[heavy][::-1].tolist()
        chosen = [0]
        tokens_left, patches_left = self.S - self.token_list[0], self.P - self.patch_list[0]
        while (light_queue or heavy_queue) and tokens_left > hole * self.mean[0] and patches_left > hole * self.mean[1]:
            behind = patches_left * self.S / (tokens_left * self.P)  # above 1: patches lag
            queue = (heavy_queue if behind >= 1 else light_queue) or light_queue or heavy_queue
            i = queue.pop(self._steepest(queue, behind))
            tokens, patches = self.token_list[i], self.patch_list[i]
            fits = tokens <= tokens_left and patches <= patches_left
            if fits and (patches_left - patches) * self.S <= LOST * (tokens_left - tokens) * self.P:
                chosen.append(i)
                tokens_left -= tokens
                patches_left -= patches
        return chosen, tokens_left, patches_left

    def _steepest(self, queue: list[int], behind: float) -> int:
        """Place in the queue of the sample to take: the next one, or while one side lags far behind (a long text has come in) the
        one among the next few that makes up for most of it, so that less extreme ones stay for slots that need no more."""
        if 1 / FAR_BEHIND <= behind <= FAR_BEHIND:
            return len(queue) - 1
        places = range(max(0, len(queue) - STEEPEST_OF), len(queue))
        return (max if behind > 1 else min)(places, key=lambda place: self.ratios[queue[place]])

    def _pair(self, candidates: np.ndarray, tokens_left: int, patches_left: int) -> list[int]:
        """The one or two candidates that fill most of what is left."""
        n = len(candidates)
        # float32 halves the memory that is swept and is exact here: sizes are whole and below 2^24. The last row stands for none.
        tokens, patches = np.zeros(n + 1, np.float32), np.zeros(n + 1, np.float32)
        tokens[:n], patches[:n] = self.tokens[candidates], self.patches[candidates]
        value = tokens / np.float32(self.S) + patches / np.float32(self.P)
        values = value[:, None] + value
        values *= tokens[:, None] + tokens <= tokens_left
        values *= patches[:, None] + patches <= patches_left
        values.flat[:: n + 2] = 0  # nothing is chosen twice
        best = divmod(int(values.argmax()), n + 1)
        return [int(candidates[i]) for i in dict.fromkeys(best) if i < n]
