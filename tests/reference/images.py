"""Image sizes and patches, said slowly."""

import math

import numpy as np


def size_rule(height: int, width: int, f: int, least: int, most: int) -> tuple[int, int]:
    """Pixels after resizing by transformers' Lfm2VlImageProcessor (`smart_resize`), which may exceed `most`
    on extreme ratios.
    """
    h, w = (max(f, round(side / f) * f) for side in (height, width))
    if h * w > most:
        beta = math.sqrt(height * width / most)
        h, w = (max(f, math.floor(side / beta / f) * f) for side in (height, width))
    elif h * w < least:
        beta = math.sqrt(least / (height * width))
        h, w = (math.ceil(side * beta / f) * f for side in (height, width))
    return h, w


def patchify(image: np.ndarray, patch: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [H, W, 3] -> patches [n, patch * patch * 3] and (t, h, w) [n, 3], one patch at a time."""
    patches, places = [], []
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    for top in range(0, rows, merge):
        for left in range(0, columns, merge):
            for row in range(top, top + merge):
                for column in range(left, left + merge):
                    block = image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                    patches.append(block.flatten())
                    places.append((0, row, column))
    return np.array(patches), np.array(places)
