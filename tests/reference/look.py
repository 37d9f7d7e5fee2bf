"""Look at a picture of the embedded world: what lies where, from its pixels alone."""

from dataclasses import dataclass

import cv2
import numpy as np

COLOURS = {
    **{"red": (255, 0, 0), "orange": (255, 140, 0), "yellow": (255, 255, 0), "green": (0, 190, 0)},
    **{"cyan": (0, 230, 230), "blue": (0, 0, 255), "purple": (160, 0, 210), "white": (255, 255, 255)},
}


@dataclass
class Blob:
    x: float  # centre of its box, in pixels
    y: float
    width: int  # of its box
    height: int
    colour: str
    mask: np.ndarray  # bool, [height, width]


def blobs(image: np.ndarray) -> list[Blob]:
    """Everything in an RGB picture [height, width, 3] that is brighter than the dark ground, from left to
    right.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(bright(image).astype(np.uint8), connectivity=8)
    found = []
    for label in range(1, count):
        x, y, width, height, _ = (int(value) for value in stats[label])
        mask = labels[y : y + height, x : x + width] == label
        brightest = image[y : y + height, x : x + width][mask].astype(int)
        found.append(
            Blob(
                x + width / 2,
                y + height / 2,
                width,
                height,
                nearest_colour(np.median(brightest, axis=0)),
                mask,
            )
        )
    return sorted(found, key=lambda blob: blob.x)


def bright(image: np.ndarray) -> np.ndarray:
    return image.max(axis=2) > 115  # half way between the ground and the darkest colour


def glyphs(image: np.ndarray) -> list[Blob]:
    """What is in each cell that is not empty, in reading order:
    the dots of a glyph need not hang together.
    """
    height, width, _ = image.shape
    rows, columns = round(height / 32), round(width / 32)
    found = []
    for row, column in np.ndindex(rows, columns):
        top, left = round(row * height / rows), round(column * width / columns)
        cell = image[top : round((row + 1) * height / rows), left : round((column + 1) * width / columns)]
        if not bright(cell).any():
            continue
        y, x = (slice(places.min(), places.max() + 1) for places in np.nonzero(bright(cell)))
        mask, pixels = bright(cell)[y, x], cell[y, x]
        # strokes are thin: half of it may be their edges
        colour = nearest_colour(np.quantile(pixels[mask], 0.75, axis=0))
        found.append(
            Blob(
                left + (x.start + x.stop) / 2,
                top + (y.start + y.stop) / 2,
                mask.shape[1],
                mask.shape[0],
                colour,
                mask,
            )
        )
    return found


def nearest_colour(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(rgb, COLOURS[name], strict=True)))


def shape_family(blob: Blob) -> str:
    """What a box tells without its outline: wide, tall or even."""
    ratio = blob.width / blob.height
    return "wide" if ratio > 1.4 else "tall" if ratio < 1 / 1.4 else "even"
