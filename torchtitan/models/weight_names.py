"""Weight names of another library, as rows of (their pattern, our pattern, transform, parts).

`*` stands for one part of a dotted name (a layer's number, `weight` or `bias`) and is carried over, in order.
Rows are tried from the top: two spellings of one weight are two rows, and the first is the one written.

A weight of theirs may be several of ours or the reverse, cut along dim 0:

    Row("qkv.weight", "wq.weight", theirs_part=Part(0, 3))        ours is the first third of theirs
    Row("gate.weight", "w13.weight", ours_part=Part(0, 2))        theirs is the first half of ours
    Row("table", "positions", theirs_part=Part(1, 2, first=1))    ours is theirs without its first row

All that is done to a weight is done row by row, so a rank reads the rows that it needs; small ones may be
changed as a whole (`Transform.whole`). Files are read and written elsewhere (hf/); here are pieces of
tensors, and state dicts that are in memory. Imports no torch until there are tensors.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def _same(rows: "Tensor") -> "Tensor":
    return rows


class Transform(NamedTuple):
    """What changes of the rows of a weight on their way in and out; it keeps dim 0, unless it is `whole`."""

    read: Callable[["Tensor"], "Tensor"] = _same  # theirs -> ours
    write: Callable[["Tensor"], "Tensor"] = _same  # ours -> theirs
    whole: bool = False  # it gets all rows at once, and each rank reads all: for small weights


class Part(NamedTuple):
    """Part `number` of `of` equal parts of a tensor's rows, or the rows from `first` to `last`."""

    number: int = 0
    of: int = 1
    first: int | None = None
    last: int | None = None  # None: to the end

    def rows(self, size: int) -> range:
        """Which rows of a tensor of `size` rows."""
        if self.first is not None:
            return range(self.first, size if self.last is None else min(self.last, size))
        return range(self.number * size // self.of, (self.number + 1) * size // self.of)


class Row(NamedTuple):
    """Their pattern, ours, what is done to the rows, and which part of one is which part of the other."""

    theirs: str
    ours: str
    transform: Transform = Transform()
    theirs_part: Part = Part()
    ours_part: Part = Part()


class Piece(NamedTuple):
    """Rows of a tensor to be made: these rows of that one, transformed."""

    source: str
    rows: range
    transform: Callable[["Tensor"], "Tensor"]
    whole: bool = False  # see Transform


class Pieces(NamedTuple):
    """Which tensors can be made of others, and how."""

    of: dict[str, list[Piece]]  # in the order of their rows
    unused: list[str]  # sources that no row knows


class Weights(NamedTuple):
    """What `read` found."""

    named: dict[str, "Tensor"]  # under our names
    # their names that no row knows, for a report: the pooling head of a published encoder, say
    unused: list[str]


class _Way(NamedTuple):
    """A row, seen from where it starts."""

    source: str
    target: str
    transform: Callable[["Tensor"], "Tensor"]
    source_part: Part
    target_part: Part
    whole: bool


def prefixed(rows: Iterable[Row], theirs: str, ours: str) -> list[Row]:
    """The same rows inside a larger model."""
    return [row._replace(theirs=theirs + row.theirs, ours=ours + row.ours) for row in rows]


def to_ours(sizes: Mapping[str, int], rows: Iterable[Row]) -> Pieces:
    """Our tensors of theirs. `sizes`: rows of each of their tensors.

    ValueError where two of their names mean the same weight, or a part of one is missing.
    """
    ways = [
        _Way(r.theirs, r.ours, r.transform.read, r.theirs_part, r.ours_part, r.transform.whole) for r in rows
    ]
    return _assemble(sizes, ways)


def to_theirs(sizes: Mapping[str, int], rows: Iterable[Row]) -> Pieces:
    """Their tensors of ours, under the first of their spellings.

    ValueError for a weight that has no name there, since leaving it out would go unseen.
    """
    ways = [
        _Way(r.ours, r.theirs, r.transform.write, r.ours_part, r.theirs_part, r.transform.whole) for r in rows
    ]
    pieces = _assemble(sizes, ways)
    if pieces.unused:
        raise ValueError(f"weight {pieces.unused[0]} has no name in this format")
    return pieces


def _assemble(sizes: Mapping[str, int], ways: list[_Way]) -> Pieces:
    found: dict[str, dict[int, Piece]] = {}
    parts: dict[str, int] = {}
    unused = []
    for name, size in sizes.items():
        known = False
        for target, way in _ways_of(name, ways):
            pieces, number = found.setdefault(target, {}), way.target_part.number
            if number in pieces:
                raise ValueError(f"weight {target} is there twice; the second time it is called {name}")
            pieces[number] = Piece(name, way.source_part.rows(size), way.transform, way.whole)
            parts[target], known = way.target_part.of, True
        if not known:
            unused.append(name)
    for target, pieces in found.items():
        if len(pieces) < parts[target]:
            held = ", ".join(piece.source for piece in pieces.values())
            raise ValueError(
                f"weight {target} is not whole: there is only {held} of its {parts[target]} parts"
            )
    return Pieces({target: [pieces[n] for n in sorted(pieces)] for target, pieces in found.items()}, unused)


def _ways_of(name: str, ways: list[_Way]) -> list[tuple[str, _Way]]:
    """For each part of a source the first row that knows it."""
    found: dict[int, tuple[str, _Way]] = {}
    for way in ways:
        if way.source_part.number not in found and (target := _translate(name, way.source, way.target)):
            found[way.source_part.number] = target, way
    return list(found.values())


def _translate(name: str, source: str, target: str) -> str | None:
    match = re.fullmatch(re.escape(source).replace(r"\*", r"([^.]+)"), name)
    if match is None:
        return None
    parts = iter(match.groups())
    return re.sub(r"\*", lambda _: next(parts), target)


def read(state: Mapping[str, "Tensor"], rows: Iterable[Row]) -> Weights:
    """Their state dict under our names. ValueError: see `to_ours`."""
    pieces = to_ours(_sizes(state), rows)
    return Weights(_made(state, pieces), pieces.unused)


def write(state: Mapping[str, "Tensor"], rows: Iterable[Row]) -> dict[str, "Tensor"]:
    """Our state dict under their names. ValueError: see `to_theirs`."""
    return _made(state, to_theirs(_sizes(state), rows))


def _sizes(state: Mapping[str, "Tensor"]) -> dict[str, int]:
    return {name: weight.shape[0] if weight.ndim else 1 for name, weight in state.items()}


def _made(state: Mapping[str, "Tensor"], pieces: Pieces) -> dict[str, "Tensor"]:
    import torch

    made = {}
    for name, of in pieces.of.items():
        if len(of) == 1 and len(of[0].rows) == _sizes({"": state[of[0].source]})[""]:
            made[name] = of[0].transform(state[of[0].source])
        else:
            made[name] = torch.cat([p.transform(state[p.source][p.rows.start : p.rows.stop]) for p in of])
    return made
