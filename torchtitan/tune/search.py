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
    known: dict[C, float | None] = {}
    best, highest = start, (yield start)
    known[start] = highest
    again = True
    while again:
        again = False
        for change in changes:
            for direction in change(best):
                improved = False
                for candidate in direction:
                    if candidate == best:
                        continue
                    if candidate not in known:
                        known[candidate] = yield candidate
                    value = known[candidate]
                    if value is None:
                        continue
                    if highest is not None and value <= highest:
                        break
                    best, highest, improved, again = candidate, value, True, True
                if improved:
                    break
