"""JPEGs that cost what photographs cost to decode, drawn from a seed, so that a benchmark needs no download.

Brightness is noise of all scales, each octave weaker than the next coarser one, colour is coarse, and there
are a few sharp edges, as in natural images. At quality 88 that gives 0.2 to 0.25 bytes a pixel; the
photographs of scikit-image have 0.16 to 0.34.
"""

import io

import numpy as np
from PIL import Image, ImageDraw


def draw_photo(height: int, width: int, seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    brightness = 128 + sum(
        _octave(height, width, cells, generator) * 55 * 0.8**step
        for step, cells in enumerate(_doubling(height, width))
    )
    reds, blues = (
        sum(_octave(height, width, cells, generator) * 20 for cells in (3, 6, 12)) for _ in range(2)
    )
    channels = np.stack(
        [brightness + reds, brightness - 0.4 * reds - 0.3 * blues, brightness + blues], axis=-1
    )
    photo = Image.fromarray(channels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(photo)
    for _ in range(12):
        x = int(generator.integers(0, width))
        y = int(generator.integers(0, height))
        size = int(generator.integers(10, 200))
        colour = tuple(int(value) for value in generator.integers(0, 256, 3))
        draw.ellipse((x, y, x + size, y + size * 0.7), fill=colour)
    return photo


def encode_jpeg(photo: Image.Image, quality: int = 88) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def make_jpegs(count: int, shortest: int = 400, longest: int = 1600, seed: int = 0) -> list[bytes]:
    """Both sides between `shortest` and `longest` pixels."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(shortest, longest + 1, size=(count, 2))
    return [
        encode_jpeg(draw_photo(int(height), int(width), seed * 100_003 + number))
        for number, (height, width) in enumerate(sizes)
    ]


def _doubling(height: int, width: int) -> list[int]:
    """Cells along the longer side: 2, 4, 8 ... up to one cell every two pixels."""
    longest = max(height, width)
    return [2**step for step in range(1, longest.bit_length()) if 2**step <= longest // 2]


def _octave(height: int, width: int, cells: int, generator: np.random.Generator) -> np.ndarray:
    rows, columns = (max(2, cells * side // max(height, width)) for side in (height, width))
    noise = Image.fromarray(generator.standard_normal((rows, columns), np.float32))
    return np.asarray(noise.resize((width, height), Image.Resampling.BILINEAR))
