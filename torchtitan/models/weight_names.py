"""Weight names of another library, as rows of (their pattern, our pattern, transform).

`*` stands for one part of a dotted name (a layer's number, `weight` or `bias`) and is carried over, in order.
Rows are tried from the top: two spellings of one weight are two rows, and the first is the one written. Pure
functions on state dicts: files are read and written elsewhere.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor


def _same(weight: Tensor) -> Tensor:
    return weight


class Transform(NamedTuple):
    """What changes of a weight on its way in and out."""

    read: Callable[[Tensor], Tensor] = _same  # theirs -> ours
    write: Callable[[Tensor], Tensor] = _same  # ours -> theirs


class Row(NamedTuple):
    """Their pattern, ours, and what is done to the weight."""

    theirs: str
    ours: str
    transform: Transform = Transform()


class Weights(NamedTuple):
    """What `read` found."""

    named: dict[str, Tensor]  # under our names
    # their names that no row knows, for a report: the pooling head of a published encoder, say
    unused: list[str]


def prefixed(rows: Iterable[Row], theirs: str, ours: str) -> list[Row]:
    """The same rows inside a larger model."""
    return [Row(theirs + row.theirs, ours + row.ours, row.transform) for row in rows]


def _translate(name: str, source: str, target: str) -> str | None:
    match = re.fullmatch(re.escape(source).replace(r"\*", r"([^.]+)"), name)
    if match is None:
        return None
    parts = iter(match.groups())
    return re.sub(r"\*", lambda _: next(parts), target)


def read(state: Mapping[str, Tensor], rows: Iterable[Row]) -> Weights:
    """Their state dict under our names. ValueError where two of their names mean the same weight."""
    rows, named, unused = list(rows), {}, []
    for name, weight in state.items():
        found = ((ours, row) for row in rows if (ours := _translate(name, row.theirs, row.ours)) is not None)
        ours, row = next(found, (None, None))
        if ours is None or row is None:
            unused.append(name)
        elif ours in named:
            raise ValueError(f"weight {ours} is there twice; the second time it is called {name}")
        else:
            named[ours] = row.transform.read(weight)
    return Weights(named, unused)


def write(state: Mapping[str, Tensor], rows: Iterable[Row]) -> dict[str, Tensor]:
    """Our state dict under their names.

    ValueError for a weight that has none, since leaving it out would go unseen.
    """
    rows, named = list(rows), {}
    for name, weight in state.items():
        found = (
            (theirs, row) for row in rows if (theirs := _translate(name, row.ours, row.theirs)) is not None
        )
        theirs, row = next(found, (None, None))
        if theirs is None or row is None:
            raise ValueError(f"weight {name} has no name in this format")
        named[theirs] = row.transform.write(weight)
    return named
