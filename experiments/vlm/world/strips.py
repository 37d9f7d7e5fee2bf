"""Strips and sheets of handwritten digits, and what is to be read in them.

A picture holds 1 to 12 digits: in a row, in a column, or in a grid that is read row by row; from 12:1 to
1:12. A document shows one picture and asks for it ("picture:"), or 2 to 4 and asks for one of them ("second
picture:"). The answer is its digits in order, "4 0 7". Held-out pictures of one digit are rare: blind, it is
guessed too often for a control.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image

from experiments.vlm.world.digits import ink, load_digits, pick_digits

GRIDS = [(rows, columns) for rows in range(2, 7) for columns in range(2, 7) if rows * columns <= 12]
LONGEST = 12  # digits in a row or column
SINGLES_KEPT = 0.3  # of held-out pictures of one digit; the others have more
CELL = (26.0, 38.0)  # pixels
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Strip:
    """A picture before it is drawn."""

    rows: int
    columns: int
    cell: float  # pixels a side
    digits: tuple[int, ...]  # their numbers, in reading order

    @property
    def text(self) -> str:
        """What is written."""
        return " ".join(load_digits()[1][number] for number in self.digits)


def random_strip(rng: random.Random, heldout: bool, longest: int = LONGEST) -> Strip:
    """A strip of at most so many digits, all of that split."""
    grids = [(rows, columns) for rows, columns in GRIDS if rows * columns <= longest]
    count = rng.randint(1, longest)
    if heldout and count == 1 and rng.random() > SINGLES_KEPT:
        count = rng.randint(2, longest)
    kinds = [(1, count), (1, count), (count, 1)] + ([rng.choice(grids)] if grids else [])
    rows, columns = rng.choice(kinds)
    cell = round(CELL[0] * (CELL[1] / CELL[0]) ** rng.random(), 2)
    return Strip(rows, columns, cell, tuple(pick_digits(rng, heldout, rows * columns)))


def random_document(rng: random.Random, heldout: bool) -> tuple[list[Strip], int]:
    """A document's pictures, and which of them is asked for."""
    count = rng.choices((1, 2, 3, 4), weights=(7, 1, 1, 1))[0]
    strips = [random_strip(rng, heldout, LONGEST if count == 1 else 4) for _ in range(count)]
    return strips, rng.randrange(count)


def ask_for(strips: list[Strip], asked: int) -> str:
    """What is asked for, with a place for each picture."""
    which = f"{ORDINALS[asked]} " if len(strips) > 1 else ""
    return "<image>" * len(strips) + f"{which}picture:"


def draw_strip(strip: Strip, rng: random.Random, written_anew: bool) -> Image.Image:
    """Dark ink on light paper, grey; sizes and places of the digits vary. `written_anew`: see `ink`."""
    cell, margin = strip.cell, rng.uniform(0, 0.15) * strip.cell
    size = tuple(math.ceil(count * cell + 2 * margin) for count in (strip.columns, strip.rows))
    image = Image.new("L", (size[0], size[1]), rng.randint(190, 255))
    shade = rng.randint(0, 90)
    scale = rng.uniform(0.78, 0.95)
    for place, number in enumerate(strip.digits):
        row, column = divmod(place, strip.columns)
        mask = ink(number, cell * scale * rng.uniform(0.92, 1.05), rng, written_anew)
        x, y = ((i + 0.5 + rng.uniform(-0.06, 0.06)) * cell + margin - mask.width / 2 for i in (column, row))
        image.paste(shade, (round(x), round(y)), mask)
    return image
