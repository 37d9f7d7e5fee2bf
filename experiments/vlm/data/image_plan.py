"""What becomes of an image, from integers alone: pictures for the encoder, tokens for the decoder.

    native    its own aspect ratio: the encoder reads a grid of patches of any height and width
    square    squeezed to a square
    padded    put in the middle of a filled square as long as its longer side, then resized
    cropped   its shorter side is as long as a square's, and of the longer one the middle is taken
    tiles     squeezed to a square, and also cut into several (tiles.py)

Nobody else knows how many cells or tokens an image has. Imports no torch.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from experiments.vlm.data import tiles
from experiments.vlm.data.image_layout import BEGIN, END, NEWLINE, Canvas, Layout, View
from experiments.vlm.model.config import Resample, TilesConfig

# Bounds of the memory that extremely long images take, where no one can see a difference.
MOST_SQUARES = 16  # a cropped image is resized to no more squares in a row, of which one is kept
LONGEST = 1 << 15  # pixels: a padded image is made no longer


@dataclass(frozen=True)
class ImagePlan:
    """The rule for an image's size and tokens."""

    patch_size: int = 16  # pixels a side
    merge_size: int = 2  # patches a side of a visual token
    min_patches: int = 4
    max_patches: int = 1024  # a multiple of merge_size squared
    resize: str = "native"  # a row of PLANS
    extra: int = 0  # class token and registers, which an image has in the encoder besides its patches
    extra_tokens: bool = False  # they become visual tokens too, the first of the image
    image_size: int | None = None  # pixels a side that the encoder was made for, of squares
    resample: Resample = "bilinear"
    fill: tuple[int, ...] = (128, 128, 128)  # colour of what a padded image has around it
    marked: bool = True  # its tokens stand between a begin and an end
    newline: bool = False  # rows of tiles end in one, and so does what has a single view
    cut: TilesConfig = TilesConfig()  # how tiles are cut
    pixels: tuple[int, int] | None = None  # least and most of an image, where these are no whole patches

    @property
    def limits(self) -> tuple[int, int]:
        """Least and most pixels of an image of its own size."""
        patch = self.patch_size**2
        return self.pixels or (self.min_patches * patch, self.max_patches * patch)

    @property
    def extra_cells(self) -> int:
        """Cells of a patch row behind the patches of a view: whole groups of those that merge."""
        return -(-self.extra // self.merge_size**2) * self.merge_size**2

    @property
    def most_tokens(self) -> int:
        """The most tokens of an image: of one of max_patches, of a square, or of tiles."""
        return PLANS[self.resize].most_tokens(self)

    @property
    def most_cells(self) -> int:
        """The most cells of a view: of one of max_patches, or of a square."""
        native = self.resize == "native"
        return (self.max_patches if native else (self.side // self.patch_size) ** 2) + self.extra_cells

    @property
    def largest(self) -> list[int]:
        """Cells of each view of an image that has as many views as there can be."""
        return [self.most_cells] * PLANS[self.resize].most_views(self)

    @property
    def mixes(self) -> bool:
        """Whether a token may be the weighted sum of several that the encoder makes."""
        return self.resize == "tiles" and self.cut.most is not None

    @property
    def side(self) -> int:
        """Pixels a side of a square: the encoder's own size, or less where max_patches asks for it."""
        cells, whole = math.isqrt(self.max_patches), (self.image_size or 0) // self.patch_size
        if whole and whole <= cells and whole % self.merge_size == 0:
            return self.image_size or 0
        cells = min(cells, whole) if whole else cells
        return cells // self.merge_size * self.merge_size * self.patch_size

    def layout(self, height: int, width: int, alone: bool = True) -> Layout:
        """What an image of that many pixels becomes. `alone`: it is the only one of its document."""
        return PLANS[self.resize].layout(self, height, width, alone)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (h, w) of an image of that many pixels: multiples of merge_size, h * w <= max_patches.

        The size rule of transformers' Lfm2VlImageProcessor, whose exported processor then makes the same
        patches; on extreme ratios that rule exceeds the maximum, and here the long side is clamped.
        """
        merge = self.merge_size
        if self.resize != "native":
            return self.side // self.patch_size, self.side // self.patch_size
        f = self.patch_size * merge
        least, most = self.limits
        h, w = (max(1, round(side / f)) for side in (height, width))
        if h * w * f * f > most:
            shrink = math.sqrt(height * width / most)
            h, w = (max(1, math.floor(side / shrink / f)) for side in (height, width))
        elif h * w * f * f < least:
            grow = math.sqrt(least / (height * width))
            h, w = (math.ceil(side * grow / f) for side in (height, width))
        h, w = _clamp(h, w, self.max_patches // merge**2)
        return h * merge, w * merge

    def single(self, height: int, width: int, size: tuple[int, int] | None = None, **how: Any) -> Layout:
        """One view of an image of that many pixels, resized to `size`, and its tokens. `how`: see View."""
        h, w = self.grid(height, width)
        size = size or (h * self.patch_size, w * self.patch_size)
        return Layout((View(h, w, h * w + self.extra_cells, size, **how),), self.tokens_of(h * w))

    def tokens_of(self, patches: int) -> np.ndarray:
        """Tokens, as in Layout, of one view of so many patches."""
        extra = self.extra if self.extra_tokens else 0
        return _tokens(patches // self.merge_size**2, extra, self.marked, self.newline)


def native(plan: ImagePlan, height: int, width: int, alone: bool) -> Layout:
    """Its own aspect ratio."""
    return plan.single(height, width)


def square(plan: ImagePlan, height: int, width: int, alone: bool) -> Layout:
    """Squeezed."""
    return plan.single(height, width, (plan.side, plan.side))


def padded(plan: ImagePlan, height: int, width: int, alone: bool) -> Layout:
    """In the middle of a filled square."""
    if height == width:
        return square(plan, height, width, alone)
    # The longer side first, which the canvas leaves as it is: both axes are resized apart anyway.
    short, long, side = *sorted((height, width)), plan.side
    fewer = -(-long // LONGEST)
    thin, whole = max(1, short // fewer), long // fewer
    size, canvas = ((side, thin), (side, whole)) if height > width else ((thin, side), (whole, side))
    return plan.single(height, width, size, canvas=Canvas(*canvas, plan.fill, side))


def cropped(plan: ImagePlan, height: int, width: int, alone: bool) -> Layout:
    """Resized until its shorter side is a square's; the middle of the longer one is kept."""
    short, long, side = *sorted((height, width)), plan.side
    whole = int(side * long / short)
    size = (side, whole) if height == short else (whole, side)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    if long <= short * MOST_SQUARES:
        return plan.single(height, width, size, corner=(top, left))
    down, across = height / size[0], width / size[1]
    box = top * down, left * across, (top + side) * down, (left + side) * across
    return plan.single(height, width, (side, side), box=box)


def tiled(plan: ImagePlan, height: int, width: int, alone: bool) -> Layout:
    """Squeezed, and cut into tiles."""
    if plan.cut.alone and not alone:
        return padded(plan, height, width, alone)
    (whole,) = square(plan, height, width, alone).views
    made = tiles.tiled(whole, plan.merge_size**2, plan.cut, plan.newline, height, width)
    marked = np.concatenate([[BEGIN], made.tokens, [END]]).astype(np.int32) if plan.marked else made.tokens
    return replace(made, tokens=marked)


class PlanKind(NamedTuple):
    """One way to plan images: a row of PLANS."""

    layout: Callable[[ImagePlan, int, int, bool], Layout]  # arguments as those of ImagePlan.layout
    most_tokens: Callable[[ImagePlan], int] = lambda plan: len(
        plan.tokens_of((plan.side // plan.patch_size) ** 2)
    )
    most_views: Callable[[ImagePlan], int] = lambda plan: 1


def _most_tiled(plan: ImagePlan) -> int:
    s = plan.side // (plan.patch_size * plan.merge_size)
    return tiles.most_tokens(s, plan.cut, plan.newline) + 2 * plan.marked


PLANS: dict[str, PlanKind] = {
    "native": PlanKind(native, lambda plan: len(plan.tokens_of(plan.max_patches))),
    "square": PlanKind(square),
    "padded": PlanKind(padded),
    "cropped": PlanKind(cropped),
    "tiles": PlanKind(tiled, _most_tiled, lambda plan: 1 + max(math.prod(grid) for grid in plan.cut.grids)),
}


@functools.lru_cache(4096)
def _tokens(visual: int, extra: int, marked: bool, newline: bool) -> np.ndarray:
    """Extra cells lie behind the patches, and what they become comes before them among the tokens."""
    numbers = np.roll(np.arange(visual + extra, dtype=np.int32), extra)
    ends = [NEWLINE] * newline + [END] * marked
    tokens = np.concatenate([[BEGIN] * marked, numbers, ends]).astype(np.int32)
    tokens.setflags(write=False)
    return tokens


def _clamp(h: int, w: int, most: int) -> tuple[int, int]:
    """Shorten the longer side until h * w <= most."""
    short = min(h, w, most)
    long = min(max(h, w), most // short)
    return (short, long) if h <= w else (long, short)
