"""What waits in front of a slot, and who leaves with the next row.

Up to `buffer` documents wait. Of one in pieces the first piece waits, and the next queues up again behind the others when
it leaves: so pieces keep their order, and a book fills no row of rows while others wait.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from experiments.vlm.data.packing import Budget, Waiting, choose, place

FIRST_LOOK = 64  # documents that wait at the first plan; it doubles up to the buffer, so that training starts early
ROWS_AHEAD = 2  # but at least so many slots' worth of tokens or patches wait, however small the samples

Place = tuple[int, int]  # (row, first patch)


class Sized(Protocol):
    """A piece, as the planner sees it."""

    @property
    def length(self) -> int: ...  # tokens

    @property
    def patches(self) -> int: ...

    @property
    def image_patches(self) -> list[int]: ...


class Queued(Protocol):
    """A document of which at least one piece waits."""

    @property
    def head(self) -> Sized: ...

    @property
    def length(self) -> int: ...  # tokens of all its pieces

    def rest(self) -> Self | None: ...  # without the head


Entry = TypeVar("Entry", bound=Queued)


class Window(Generic[Entry]):
    def __init__(self, budget: Budget, buffer: int):
        self.budget = budget
        self.buffer = buffer
        self.entries: list[Entry] = []  # oldest first
        self.plans = 0

    def refill(self, draw: Callable[[], Entry | None]) -> None:
        """Let in what `draw` gives until enough wait, or until it has nothing more."""
        budget, entries = self.budget, self.entries
        goal = min(self.buffer, FIRST_LOOK << min(self.plans, 16))
        held = sum(entry.length for entry in entries)
        tokens = sum(entry.head.length for entry in entries)
        patches = sum(entry.head.patches for entry in entries)
        # The last condition bounds the memory where documents are long.
        while held < self.buffer * budget.seq_len and (
            len(entries) < goal or (tokens < ROWS_AHEAD * budget.seq_len and patches < ROWS_AHEAD * budget.patches)
        ):
            entry = draw()
            if entry is None:
                return
            entries.append(entry)
            held += entry.length
            tokens += entry.head.length
            patches += entry.head.patches

    def take(self) -> list[tuple[Entry, list[Place]]]:
        """Those whose heads share the next row, oldest first, with the places of the heads' images; none if nobody waits."""
        self.plans += 1
        if not self.entries:
            return []
        chosen = self._choose()
        taken = [self.entries[i] for i in chosen]
        gone = set(chosen)
        left = [entry for i, entry in enumerate(self.entries) if i not in gone]
        rests = [rest for entry in taken if (rest := entry.rest()) is not None]
        if not left:
            rests = self._fill_up(taken, rests)
        self.entries = left + rests
        places = iter(place(self._images(taken), self.budget) or [])
        return [(entry, [next(places) for _ in entry.head.image_patches]) for entry in taken]

    def _fill_up(self, taken: list[Entry], rests: list[Entry]) -> list[Entry]:
        """Where nobody else waits (a book by itself): further pieces of the same documents. Returns those that do not fit."""
        waiting, left = deque(rests), []
        while waiting:
            entry = waiting.popleft()
            tokens = sum(one.head.length for one in taken) + entry.head.length
            if not self.budget.holds(tokens, self._images([*taken, entry])):
                left.append(entry)
                continue
            taken.append(entry)
            if (rest := entry.rest()) is not None:
                waiting.append(rest)
        return left

    @staticmethod
    def _images(entries: Iterable[Queued]) -> list[int]:
        return [patches for entry in entries for patches in entry.head.image_patches]

    def _choose(self) -> list[int]:
        heads = [entry.head for entry in self.entries]
        tokens, patches = np.array([head.length for head in heads]), np.array([head.patches for head in heads])
        images = [head.image_patches for head in heads] if self.budget.patch_rows > 1 else ()
        return choose(Waiting(tokens, patches, images), self.budget)
