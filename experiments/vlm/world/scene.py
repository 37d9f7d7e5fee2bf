"""What a picture of the embedded world holds, before anything is drawn.

A scene is a grid of cells of about 32 px with at most one thing a cell. Its kind follows from the things
alone, so a picture has one right caption:

    single     one shape: its size, colour and place
    relation   two shapes in one row or column, a big and a small one: how the big one lies to the small one
    count      2 to 5 equal shapes: how many
    groups     two such groups, the larger first, 3 to 7 things in all: how many of each (not in `sees`)
    text       1 to 4 glyphs along a row (down the column if it is the only one): what is written, its colour
    listing    different shapes, in half of the cells or more: each in reading order (not in `sees`)

Circle, oval and egg differ in nothing but their aspect ratio, and so do square, slab and post: a model that
squeezes pictures to squares cannot distinguish them.

Splits are a partition of the scenes themselves: `held_out` hashes grid, things and cells. So a held-out
arrangement never occurs in training, in no world and with no seed, not even at another size or jitter.
"""

import hashlib
import random
from dataclasses import dataclass

# 23, from 1:6 to 6:1
GRIDS = [(rows, columns) for rows in range(1, 7) for columns in range(1, 7) if rows * columns <= 12]
CELL = 32  # pixels
COLOURS = {
    "red": (230, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 230, 50),
    "green": (40, 185, 60),
    "cyan": (50, 215, 225),
    "blue": (50, 80, 240),
    "purple": (165, 55, 215),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "oval", "egg", "square", "slab", "post", "triangle", "diamond", "cross", "star", "ring")
GLYPHS = "0123456789ACEHKLTX"
# from, to, and the jitter that stays inside the cell
EXTENTS = {"small": (12, 14, 5), "big": (20, 22, 3), "glyph": (20, 22, 3)}
SIZES = ("small", "big")
HELD_OUT_SHARE = 16  # one scene in so many is held out


@dataclass(frozen=True)
class Thing:
    """A shape or glyph in a cell, as it is drawn."""

    shape: str  # of SHAPES or GLYPHS
    colour: str
    size: str  # of EXTENTS
    row: int
    column: int
    rgb: tuple[int, int, int]
    extent: int  # longer side, in pixels of a cell of 32
    shift: tuple[int, int]  # (x, y) from the centre of the cell, in the same pixels

    @property
    def look(self) -> tuple[str, str, str]:
        """What a caption says of it, its place apart: size, colour, shape."""
        return self.size, self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: its grid, its sizes and the things in its cells."""

    kind: str
    rows: int
    columns: int
    height: int  # pixels
    width: int
    cell: float  # pixels a side, before the picture was drawn off the grid
    ground: str  # how the background is painted: flat, gradient or grain
    background: tuple[int, int, int]
    things: tuple[Thing, ...]  # in reading order

    @property
    def arrangement(self) -> tuple:
        """All that a caption can mention, without jitter, shades and pixels."""
        return self.rows, self.columns, *((*thing.look, thing.row, thing.column) for thing in self.things)


def held_out(content: object) -> bool:
    """The split of a scene's arrangement, or of a text: the same in every process and on every machine."""
    return hashlib.blake2b(repr(content).encode(), digest_size=1).digest()[0] % HELD_OUT_SHARE == 0


def sees_scene(rng: random.Random, heldout: bool) -> Scene:
    """A random scene of that split for learning to see: cells of 32 px on one even, dark colour."""
    while True:
        rows, columns = rng.choice(GRIDS)
        scene = _compose(
            rng, rng.choice(["single", "text"] + ["relation", "count"] * (rows * columns > 1)), rows, columns
        )
        if held_out(scene.arrangement) == heldout:
            return scene


def varied_scene(rng: random.Random, heldout: bool, longest: int) -> Scene:
    """The same world with listings, cells of 32 to 256 px, sides up to about `longest`, painted grounds."""
    while True:
        rows, columns = rng.choice(GRIDS)
        cell = CELL * min(8.0, longest / CELL / max(rows, columns)) ** rng.random()
        kind = rng.choice(
            ["single", "text"]
            + ["relation", "count", "listing"] * (rows * columns > 1)
            + ["groups"] * (rows * columns > 2)
        )
        scene = _compose(rng, kind, rows, columns, cell, rng.choice(("flat", "gradient", "grain")))
        if held_out(scene.arrangement) == heldout:
            return scene


def _compose(
    rng: random.Random, kind: str, rows: int, columns: int, cell: float = CELL, ground: str = "flat"
) -> Scene:
    things = sorted(PLACE[kind](rng, rows, columns), key=lambda thing: (thing.row, thing.column))
    # a painted ground must be seen to be painted
    darkest, lightest = (0, 40) if ground == "flat" else (35, 75)
    background = (
        rng.randint(darkest, lightest),
        rng.randint(darkest, lightest),
        rng.randint(darkest, lightest),
    )
    height, width = _side(rng, rows, cell), _side(rng, columns, cell)
    return Scene(kind, rows, columns, height, width, cell, ground, background, tuple(things))


def _side(rng: random.Random, cells: int, cell: float) -> int:
    """Up to 6 px (of a cell of 32) off the grid, 2 for each cell: a circle stays rounder than an oval."""
    off = min(6, 2 * cells)
    return round((cells * CELL + rng.randint(-off, off)) * cell / CELL)


def _make_thing(rng: random.Random, shape: str, colour: str, size: str, cell: tuple[int, int]) -> Thing:
    low, high, jitter = EXTENTS[size]
    red, green, blue = (min(255, max(0, value + rng.randint(-15, 15))) for value in COLOURS[colour])
    shift = rng.randint(-jitter, jitter), rng.randint(-jitter, jitter)
    return Thing(shape, colour, size, *cell, (red, green, blue), rng.randint(low, high), shift)


def _draw_looks(rng: random.Random, number: int) -> list[tuple[str, str]]:
    """`number` different (shape, colour)."""
    found: dict[tuple[str, str], None] = {}
    while len(found) < number:
        found[rng.choice(SHAPES), rng.choice(list(COLOURS))] = None
    return list(found)


def _draw_cells(rng: random.Random, rows: int, columns: int, number: int) -> list[tuple[int, int]]:
    return [divmod(cell, columns) for cell in rng.sample(range(rows * columns), number)]


def _single(rng: random.Random, rows: int, columns: int) -> list[Thing]:
    return [
        _make_thing(rng, *_draw_looks(rng, 1)[0], rng.choice(SIZES), _draw_cells(rng, rows, columns, 1)[0])
    ]


def _relation(rng: random.Random, rows: int, columns: int) -> list[Thing]:
    along_row = columns > 1 and (rows == 1 or rng.random() < 0.5)
    big, small = rng.sample(range(columns if along_row else rows), 2)
    line = rng.randrange(rows if along_row else columns)
    cells = [(line, big), (line, small)] if along_row else [(big, line), (small, line)]
    return [
        _make_thing(rng, *look, size, cell)
        for look, size, cell in zip(_draw_looks(rng, 2), ("big", "small"), cells, strict=True)
    ]


def _count(rng: random.Random, rows: int, columns: int) -> list[Thing]:
    number = rng.randint(2, min(5, rows * columns))
    (look,) = _draw_looks(rng, 1)
    size = rng.choice(SIZES)
    return [_make_thing(rng, *look, size, cell) for cell in _draw_cells(rng, rows, columns, number)]


def _groups(rng: random.Random, rows: int, columns: int) -> list[Thing]:
    """Never as many in one as in the other: the larger one is named first."""
    room = rows * columns
    most = rng.randint(2, min(5, room - 1))
    fewer = rng.randint(1, min(2, most - 1, room - most))
    looks = [(*look, rng.choice(SIZES)) for look in _draw_looks(rng, 2)]
    cells = _draw_cells(rng, rows, columns, most + fewer)
    return [_make_thing(rng, *looks[place >= most], cell) for place, cell in enumerate(cells)]


def _text(rng: random.Random, rows: int, columns: int) -> list[Thing]:
    down = columns == 1
    line = rows if down else columns
    length = rng.randint(1, min(4, line))
    start, across = rng.randint(0, line - length), rng.randrange(1 if down else rows)
    colour = rng.choice(list(COLOURS))
    cells = [(start + i, across) if down else (across, start + i) for i in range(length)]
    return [_make_thing(rng, rng.choice(GLYPHS), colour, "glyph", cell) for cell in cells]


def _listing(rng: random.Random, rows: int, columns: int) -> list[Thing]:
    number = rng.randint(max(2, rows * columns // 2), rows * columns)
    cells = _draw_cells(rng, rows, columns, number)
    return [
        _make_thing(rng, *look, rng.choice(SIZES), cell)
        for look, cell in zip(_draw_looks(rng, number), cells, strict=True)
    ]


PLACE = {
    "single": _single,
    "relation": _relation,
    "count": _count,
    "groups": _groups,
    "text": _text,
    "listing": _listing,
}
