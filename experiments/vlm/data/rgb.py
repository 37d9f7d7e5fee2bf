"""An image that Pillow has loaded, as uint8 RGB, a box at a time: a whole copy of a large one would cost more
than the image.

Transparency is composited onto white, as transformers' image processors do. 16-bit grey is scaled to 8 bits
(Pillow would clip it to white).
"""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image as PILImage

STRIP_PIXELS = 1 << 20

Box = tuple[int, int, int, int]  # left, top, right, bottom


class Rgb:
    """Raises whatever Pillow does."""

    def __init__(self, image: PILImage.Image):
        image.load()
        self._image = image
        self.width, self.height = image.size
        self._convert = self._conversion()

    def box(self, box: Box) -> np.ndarray:
        """uint8 [height, width, 3] of a part of it."""
        is_whole = box == (0, 0, self.width, self.height)
        return np.array(self._convert(self._image if is_whole else self._image.crop(box)))

    def columns(self) -> Iterator[Box]:
        """Boxes of its full height, side by side, of about STRIP_PIXELS each."""
        step = max(1, STRIP_PIXELS // self.height)
        for left in range(0, self.width, step):
            yield left, 0, min(left + step, self.width), self.height

    def rows(self) -> Iterator[Box]:
        """Boxes of its full width, one below the other, of about STRIP_PIXELS each."""
        step = max(1, STRIP_PIXELS // self.width)
        for top in range(0, self.height, step):
            yield 0, top, self.width, min(top + step, self.height)

    def _conversion(self) -> Callable[[PILImage.Image], PILImage.Image]:
        image = self._image
        if image.has_transparency_data:
            return _on_white
        if image.mode.startswith("I") or image.mode == "F":
            scale = self._scale()
            return lambda part: _eight_bits(part, scale)
        return lambda part: part if part.mode == "RGB" else part.convert("RGB")

    def _scale(self) -> Callable[[np.ndarray], np.ndarray]:
        """To 0 ... 255 from grey of 16 bits or floats in 0 ... 1; other numbers are clipped, as by Pillow."""
        most = np.max([np.asarray(self._image.crop(box)).max() for box in self.rows()])
        if self._image.mode == "F":
            return lambda values: values * 255 if most <= 1 else values
        return lambda values: values / 257 if most > 255 else values  # 65535 -> 255


def _on_white(part: PILImage.Image) -> PILImage.Image:
    part = part.convert("RGBA")
    return PILImage.alpha_composite(PILImage.new("RGBA", part.size, "white"), part).convert("RGB")


def _eight_bits(part: PILImage.Image, scale: Callable[[np.ndarray], np.ndarray]) -> PILImage.Image:
    values = scale(np.asarray(part).astype(np.float64))
    return PILImage.fromarray(np.nan_to_num(values).clip(0, 255).astype(np.uint8)).convert("RGB")
