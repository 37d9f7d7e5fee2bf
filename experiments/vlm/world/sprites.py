"""Masks of the world's shapes and glyphs, drawn once for each size.

Shapes are polygons and ellipses, drawn four times too large and averaged down. Glyphs are our own 5 x 7 dots
(below: seven rows of five bits), so that no font file or font library decides what a letter looks like.
"""

import math
from functools import lru_cache

from PIL import Image, ImageDraw

FINE = 4  # drawn this many times too large
THIN = 0.52  # short side of oval, egg, slab and post

DOTS = {
    **{
        "0": "0e11131519110e",
        "1": "040c040404040e",
        "2": "0e11010608101f",
        "3": "0e11010601110e",
        "4": "02060a121f0202",
    },
    **{
        "5": "1f101e0101110e",
        "6": "0608101e11110e",
        "7": "1f010204080808",
        "8": "0e11110e11110e",
        "9": "0e11110f01020c",
    },
    **{
        "A": "0e11111f111111",
        "C": "0e11101010110e",
        "D": "1e11111111111e",
        "E": "1f10101e10101f",
        "F": "1f10101e101010",
    },
    **{
        "H": "1111111f111111",
        "J": "0101010101110e",
        "K": "11121418141211",
        "L": "1010101010101f",
        "M": "111b1515111111",
    },
    **{
        "N": "11191513111111",
        "P": "1e11111e101010",
        "R": "1e11111e141211",
        "T": "1f040404040404",
        "U": "1111111111110e",
    },
    **{"V": "11111111110a04", "W": "11111115151b11", "X": "11110a040a1111", "Y": "11110a04040404"},
}
STAR = [
    (0.5 + r * math.sin(i * math.pi / 5), 0.53 - r * math.cos(i * math.pi / 5))
    for i in range(10)
    for r in [0.22 if i % 2 else 0.53]
]
BAR = 0.32  # from the border to the bars of a cross
CROSS = [(BAR, 0), (1 - BAR, 0), (1 - BAR, BAR), (1, BAR), (1, 1 - BAR), (1 - BAR, 1 - BAR)]
CROSS += [(1 - x, 1 - y) for x, y in CROSS]
# (width, height) of the box, and the outline inside it: a name of Pillow's, or corners in units of the box.
OUTLINES: dict[str, tuple[float, float, str | list[tuple[float, float]]]] = {
    "circle": (0.94, 0.94, "ellipse"),
    "oval": (1, THIN, "ellipse"),
    "egg": (THIN, 1, "ellipse"),
    "square": (0.86, 0.86, "rectangle"),
    "slab": (1, THIN, "rectangle"),
    "post": (THIN, 1, "rectangle"),
    "triangle": (1, 0.9, [(0.5, 0), (1, 1), (0, 1)]),
    "diamond": (1, 1, [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]),
    "cross": (1, 1, CROSS),
    "star": (1, 1, STAR),
    "ring": (1, 1, "ellipse"),
}
HOLE = 0.28  # of a ring: from the border, in units of its width


@lru_cache(maxsize=4096)
def sprite(shape: str, extent: int) -> Image.Image:
    """Mask of a shape or glyph whose longer side is `extent` pixels; mode L, 255 inside."""
    return _glyph(shape, extent) if shape in DOTS else _outline(shape, extent)


def _outline(shape: str, extent: int) -> Image.Image:
    relative_width, relative_height, form = OUTLINES[shape]
    width, height = max(1, round(relative_width * extent)), max(1, round(relative_height * extent))
    mask = Image.new("L", (FINE * width, FINE * height))
    draw = ImageDraw.Draw(mask)
    right, bottom = FINE * width - 1, FINE * height - 1
    if isinstance(form, str):
        getattr(draw, form)((0, 0, right, bottom), fill=255)
    else:
        draw.polygon([(x * right, y * bottom) for x, y in form], fill=255)
    if shape == "ring":
        draw.ellipse((HOLE * right, HOLE * bottom, (1 - HOLE) * right, (1 - HOLE) * bottom), fill=0)
    return mask.reduce(FINE)


def _glyph(character: str, extent: int) -> Image.Image:
    rows = bytes.fromhex(DOTS[character])
    dots = Image.new("L", (5, 7))
    dots.putdata([255 * (row >> (4 - column) & 1) for row in rows for column in range(5)])
    width = max(5, round(extent * 5 / 7))
    return dots.resize((FINE * width, FINE * extent), Image.Resampling.NEAREST).reduce(FINE)
