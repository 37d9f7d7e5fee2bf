"""What becomes of an image, from integers alone: pictures for the encoder, tokens for the decoder.

    native    its own aspect ratio: the encoder reads a grid of patches of any height and width
    square    squeezed to a square
    padded    put in the middle of a filled square as long as its longer side, then resized
    cropped   its shorter side is as long as a square's, and of the longer one the middle is taken

Nobody else knows how many cells or tokens an image has. An image may have several views; each lies inside one
patch row, and where one is lost, the image is. Imports no torch.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from experiments.vlm.model.config import Resample, Resize

BEGIN, END = -1, -2  # in Layout.tokens
# What bounds the memory of squares made of endless images, where no one can see a difference.
MOST_SQUARES = 16  # of a cropped one no more squares in a row are resized
LONGEST = 1 << 15  # a padded one is made no longer


@dataclass(frozen=True)
class View:
    """A picture that the encoder reads as one segment, and how it is made of the image's pixels."""

    h: int  # patches
    w: int
    cells: int  # places of a patch row: the patches, and behind them those of the encoder's class token
    size: tuple[int, int]  # (height, width) in pixels that the image is resized to
    middle: tuple[int, int] | None = None  # rows and columns that are taken of it before
    # the filled one in whose middle it is put then, and which is resized to the plan's square
    canvas: tuple[int, int] | None = None
    corner: tuple[int, int] = (0, 0)  # first row and column of the h x w patches that are taken of all that


@dataclass(frozen=True)
class Layout:
    """An image in the two sequences. `tokens`: int32, what stands for it among the tokens: BEGIN, END, or the
    number of a visual token among the image's own, which are those of its views one after the other.
    """

    views: tuple[View, ...]
    tokens: np.ndarray

    @property
    def cells(self) -> int:
        """Places that it takes of patch rows."""
        return sum(view.cells for view in self.views)

    @property
    def visual_tokens(self) -> int:
        """How many of its tokens the encoder makes."""
        return int(np.count_nonzero(self.tokens >= 0))


@dataclass(frozen=True)
class ImagePlan:
    """The rule for an image's size and tokens."""

    patch_size: int = 16  # pixels a side
    merge_size: int = 2  # patches a side of a visual token
    min_patches: int = 4
    max_patches: int = 1024  # a multiple of merge_size squared
    resize: Resize = "native"
    extra: int = 0  # class token and registers, which an image has in the encoder besides its patches
    extra_tokens: bool = False  # they become visual tokens too, the first of the image
    image_size: int | None = None  # pixels a side that the encoder was made for, of squares
    resample: Resample = "bilinear"
    fill: tuple[int, ...] = (128, 128, 128)  # colour of what a padded image has around it
    marked: bool = True  # its tokens stand between a begin and an end

    @property
    def extra_cells(self) -> int:
        """Cells of a patch row behind the patches of a view: whole groups of those that merge."""
        return -(-self.extra // self.merge_size**2) * self.merge_size**2

    @property
    def most_tokens(self) -> int:
        """Of an image of max_patches."""
        return len(self._tokens(self.max_patches))

    @property
    def most_cells(self) -> int:
        """Of a view of max_patches."""
        return self.max_patches + self.extra_cells

    @property
    def side(self) -> int:
        """Pixels a side of a square: the encoder's own size, or less where max_patches asks for it."""
        cells, whole = math.isqrt(self.max_patches), (self.image_size or 0) // self.patch_size
        if whole and whole <= cells and whole % self.merge_size == 0:
            return self.image_size or 0
        cells = min(cells, whole) if whole else cells
        return cells // self.merge_size * self.merge_size * self.patch_size

    def layout(self, height: int, width: int) -> Layout:
        """Of an image of that many pixels."""
        h, w = self.grid(height, width)
        return Layout((self._view(h, w, height, width),), self._tokens(h * w))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (h, w) of an image of that many pixels: multiples of merge_size, h * w <= max_patches.

        The size rule of transformers' Lfm2VlImageProcessor, whose exported processor then makes the same
        patches; on extreme ratios that rule exceeds the maximum, and here the long side is clamped.
        """
        merge = self.merge_size
        if self.resize != "native":
            return self.side // self.patch_size, self.side // self.patch_size
        f = self.patch_size * merge
        most, least = (patches * self.patch_size**2 for patches in (self.max_patches, self.min_patches))
        h, w = (max(1, round(side / f)) for side in (height, width))
        if h * w * f * f > most:
            shrink = math.sqrt(height * width / most)
            h, w = (max(1, math.floor(side / shrink / f)) for side in (height, width))
        elif h * w * f * f < least:
            grow = math.sqrt(least / (height * width))
            h, w = (math.ceil(side * grow / f) for side in (height, width))
        h, w = _clamp(h, w, self.max_patches // merge**2)
        return h * merge, w * merge

    def _view(self, h: int, w: int, height: int, width: int) -> View:
        cells, side = h * w + self.extra_cells, self.side
        short, long = sorted((height, width))
        if self.resize == "padded" and height != width:
            # The longer side first, which the canvas leaves as it is: both axes are resized apart anyway.
            fewer = -(-long // LONGEST)
            thin, whole = max(1, short // fewer), long // fewer
            turned = height > width
            size, canvas = ((side, thin), (side, whole)) if turned else ((thin, side), (whole, side))
            return View(h, w, cells, size, canvas=canvas)
        if self.resize == "cropped":
            used = min(long, short * MOST_SQUARES)
            middle = None if used == long else (min(height, used), min(width, used))
            whole = int(side * used / short)
            size = (side, whole) if height == short else (whole, side)
            return View(h, w, cells, size, middle, corner=((size[0] - side) // 2, (size[1] - side) // 2))
        size = (h * self.patch_size, w * self.patch_size) if self.resize == "native" else (side, side)
        return View(h, w, cells, size)

    def _tokens(self, patches: int) -> np.ndarray:
        extra = self.extra if self.extra_tokens else 0
        return _tokens(patches // self.merge_size**2, extra, self.marked)


@functools.lru_cache(4096)
def _tokens(visual: int, extra: int, marked: bool) -> np.ndarray:
    """Extra cells lie behind the patches, and what they become comes before them among the tokens."""
    numbers = np.roll(np.arange(visual + extra, dtype=np.int32), extra)
    tokens = np.concatenate([[BEGIN], numbers, [END]]).astype(np.int32) if marked else numbers
    tokens.setflags(write=False)
    return tokens


def _clamp(h: int, w: int, most: int) -> tuple[int, int]:
    """Shorten the longer side until h * w <= most."""
    short = min(h, w, most)
    long = min(max(h, w), most // short)
    return (short, long) if h <= w else (long, short)
