"""What an image becomes: pictures for the encoder; visual tokens, marks and newlines among the tokens.

An image may have several views, which its plan chooses (image_plan.py). Each lies inside one patch row; an
image that loses one is lost. Imports no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.vlm.batch import TAPS

BEGIN, END, NEWLINE = -1, -2, -3  # in Layout.tokens
Taps = tuple[np.ndarray, np.ndarray]  # numbers of visual tokens int32 [t, TAPS], their weights float32


class Canvas(NamedTuple):
    """A filled picture in whose middle an image is put."""

    height: int  # pixels
    width: int
    fill: tuple[int, ...]
    side: int | None = None  # all of it is resized to a square of so many pixels; None: it stays as it is


@dataclass(frozen=True)
class View:
    """A picture that the encoder reads as one segment, and how it is made of the image's pixels."""

    h: int  # patches
    w: int
    cells: int  # places of a patch row: the patches, and behind them those of the encoder's class token
    size: tuple[int, int]  # (height, width) in pixels that the image is resized to
    # (top, left, bottom, right), in its pixels, of what is resized so; None: all of it
    box: tuple[float, float, float, float] | None = None
    canvas: Canvas | None = None  # what it is put on then
    corner: tuple[int, int] = (0, 0)  # first row and column of the h x w patches that are taken of all that

    @property
    def picture(self) -> tuple[object, ...]:
        """Equal in views that are parts of one picture."""
        return self.size, self.box, self.canvas


@dataclass(frozen=True)
class Layout:
    """An image in the two sequences. `tokens`: int32, what stands for it among the tokens: BEGIN, END,
    NEWLINE (a row of the projector's own), or the number of a visual token among the image's own, which are
    those of its views one after the other.
    """

    views: tuple[View, ...]
    tokens: np.ndarray
    # which visual tokens its last ones are weighted sums of; made on demand, being ten times as large
    mix: Callable[[], Taps] | None = None

    @property
    def cells(self) -> int:
        """Places that it takes of patch rows."""
        return sum(view.cells for view in self.views)

    @property
    def visual_tokens(self) -> int:
        """How many of its tokens the encoder makes."""
        return int(np.count_nonzero(self.tokens >= 0))

    def taps(self) -> Taps:
        """The taps of each of its tokens; a token that is no sum has its own number, with weight 1."""
        numbers = np.repeat(self.tokens[:, None], TAPS, 1)
        weights = np.zeros(numbers.shape, np.float32)
        weights[:, 0] = 1
        if self.mix:
            mixed = self.mix()
            last = np.flatnonzero(self.tokens >= 0)[-len(mixed[0]) :]
            numbers[last], weights[last] = mixed
        return numbers, weights
