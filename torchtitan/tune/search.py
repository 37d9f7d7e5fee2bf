"""The best of many candidates by measuring few: from one on, one kind of change after the other. Pure."""

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from typing import TypeVar

C = TypeVar("C", bound=Hashable)
# The best so far -> directions, each of candidates that go ever further from it. They may be lazy, so that
# what was measured meanwhile decides about them.
Change = Callable[[C], Iterable[Iterable[C]]]


def climb(start: C, changes: Sequence[Change[C]]) -> Generator[C, float | None, None]:
    """Yields what to measure next, each candidate once; takes how good it is, None where it does not run.

    A direction is followed while each of its candidates is better than all before, or does not run. The
    changes are gone through again until a whole round finds nothing better.
    """
    known, best, again = {start: (yield start)}, start, True
    while again:
        again = False
        for change in changes:
            better = yield from _follow(best, change(best), known)
            again |= better != best
            best = better


def _follow(
    best: C, directions: Iterable[Iterable[C]], known: dict[C, float | None]
) -> Generator[C, float | None, C]:
    """What the first direction that leads to something better leads to; else `best`."""
    before = best
    for direction in directions:
        for candidate in direction:
            if candidate not in known:
                known[candidate] = yield candidate
            value, highest = known[candidate], known[best]
            if value is None or candidate == best:
                continue
            if highest is not None and value <= highest:
                break
            best = candidate
        if best != before:
            break
    return best
