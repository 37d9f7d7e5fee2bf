"""Tiles: an image squeezed into a square, and the same image cut into squares of that size (AnyRes;
LLaVA-NeXT, Liu et al., 2024; LLaVA-OneVision, Li et al., 2024).

    views    the whole | the image, as large as the best of some grids of tiles lets it be, in the middle of
             that grid on black, tile by tile
    tokens   those of the whole | the tiles' joined to rows and columns of the grid, without those of the
             black border, row by row, a newline behind each row

Where a limit is given and the joined tokens are well above it, they are resized bilinearly: each is then a
weighted sum of four. Numbers, orders and roundings are those of transformers.
"""

import functools
import math

import numpy as np

from experiments.vlm.batch import TAPS
from experiments.vlm.data.image_layout import NEWLINE, Canvas, Layout, Taps, View
from experiments.vlm.model.config import TilesConfig

BLACK = (0, 0, 0)
FAR_ABOVE = 1.1  # how many times as long and wide as allowed joined tokens must be to be resized


def tiled(whole: View, merged: int, config: TilesConfig, newline: bool, height: int, width: int) -> Layout:
    """The layout of an image of that many pixels. `whole`: the view of all of it; `merged`: patches of a
    visual token; `newline`: rows of tiles end in one.
    """
    side, s = whole.size[0], math.isqrt(whole.h * whole.w // merged)
    grid = best_grid(height, width, side, config.grids)
    numbers = _unpadded(_joined(s, *grid, whole.cells // merged), height, width)
    shrunk = _shrunk(numbers.shape[0], numbers.shape[1], s, config)
    mix = functools.partial(_four_taps, numbers, shrunk) if shrunk else None
    shown = _first_taps(numbers, shrunk) if shrunk else numbers
    tokens = np.concatenate([np.arange(s * s, dtype=np.int32), _rows(shown, newline)])
    return Layout((whole, *_tiles(whole, grid, height, width)), tokens, mix)


def best_grid(height: int, width: int, side: int, grids: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
    """(rows, columns) of the grid that shows most of the image's pixels, and wastes least among those."""

    def worth(grid: tuple[int, ...]) -> tuple[int, int]:
        scale = min(grid[1] * side / width, grid[0] * side / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - grid[0] * grid[1] * side * side

    rows, columns = max(grids, key=worth)
    return rows, columns


def most_tokens(s: int, config: TilesConfig, newline: bool) -> int:
    """The most tokens that an image can have, with s * s a tile."""
    return s * s + max(
        _count(h, w, s, config, newline)
        for rows, columns in config.grids
        for h, w in _sides_unpadded(rows * s, columns * s)
    )


def _count(h: int, w: int, s: int, config: TilesConfig, newline: bool) -> int:
    rows, columns = _shrunk(h, w, s, config) or (h, w)
    return rows * (columns + newline)


def _sides_unpadded(h: int, w: int) -> list[tuple[int, int]]:
    """Every size that is left where as much is taken off both ends of one side."""
    return [(left, w) for left in range(h, 0, -2)] + [(h, left) for left in range(w, 0, -2)]


def _tiles(whole: View, grid: tuple[int, int], height: int, width: int) -> list[View]:
    side = whole.size[0]
    rows, columns = (count * side for count in grid)
    down, across = rows / height, columns / width
    size = min(math.ceil(height * across), rows), columns
    if across >= down:
        size = rows, min(math.ceil(width * down), columns)
    canvas = Canvas(rows, columns, BLACK)
    corners = [(top, left) for top in range(0, rows, side) for left in range(0, columns, side)]
    return [View(whole.h, whole.w, whole.cells, size, canvas=canvas, corner=corner) for corner in corners]


@functools.lru_cache(256)
def _joined(s: int, rows: int, columns: int, stride: int) -> np.ndarray:
    """int32 [rows * s, columns * s]: numbers of the tokens of tiles that each have s * s, `stride` apart; the
    first are the whole's.
    """
    tile = (1 + np.arange(rows * columns, dtype=np.int32)).reshape(rows, 1, columns, 1) * stride
    numbers = tile + np.arange(s * s, dtype=np.int32).reshape(1, s, 1, s)
    joined = numbers.reshape(rows * s, columns * s)
    joined.setflags(write=False)
    return joined


def _unpadded(numbers: np.ndarray, height: int, width: int) -> np.ndarray:
    """Without the rows or columns that show the border alone."""
    rows, columns = numbers.shape
    if width / height > columns / rows:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return numbers[border : rows - border]
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return numbers[:, border : columns - border]


def _shrunk(rows: int, columns: int, s: int, config: TilesConfig) -> tuple[int, int] | None:
    """The size that so many joined tokens are resized to; None: they stay."""
    ratio = math.sqrt(rows * columns / (config.most * s**2)) if config.most else 0.0
    return (int(rows // ratio), int(columns // ratio)) if ratio > FAR_ABOVE else None


def _rows(numbers: np.ndarray, newline: bool) -> np.ndarray:
    ends = np.full((len(numbers), int(newline)), NEWLINE, np.int32)
    return np.concatenate([numbers, ends], 1).reshape(-1)


def _first_taps(numbers: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    above, left = (_neighbours(source, target)[0] for source, target in zip(numbers.shape, size, strict=True))
    return numbers[np.ix_(above, left)]


def _four_taps(numbers: np.ndarray, size: tuple[int, int]) -> Taps:
    """Bilinear, not antialiased, cells seen as areas (align_corners = False)."""
    (above, below, down), (left, right, across) = (
        _neighbours(source, target) for source, target in zip(numbers.shape, size, strict=True)
    )
    taps = [numbers[np.ix_(y, x)] for y in (above, below) for x in (left, right)]
    weights = [y[:, None] * x for y in (1 - down, down) for x in (1 - across, across)]
    return np.stack(taps, -1).reshape(-1, TAPS), np.stack(weights, -1).reshape(-1, TAPS)


def _neighbours(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `target` places the two of `source` around it, and how near the second is, float32."""
    place = np.maximum((np.arange(target) + 0.5) * source / target - 0.5, 0)
    first = np.floor(place).astype(np.int64)
    return first, np.minimum(first + 1, source - 1), (place - first).astype(np.float32)
