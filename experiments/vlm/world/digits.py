"""Digits as many people wrote them: 1,797 pictures of 8 x 8, the only ones here that nobody drew for us.

digits.png holds them in rows of 60 and in the order of scikit-learn's `load_digits`, each of the values 0 to
16 times 15; its text "Labels" says what they are. E. Alpaydin and C. Kaynak: Optical Recognition of
Handwritten Digits, UCI Machine Learning Repository, 1998, doi:10.24432/C50P49, CC BY 4.0.

The first 1,300 train, the last 497 are held out: people whose writing no training picture shows.
"""

import math
import random
from functools import lru_cache
from pathlib import Path

from PIL import Image

ACROSS = 60  # in a row of digits.png
PIXELS = 8  # a side
TRAINING = 1300
TURN, SLANT, STRETCH = 12.0, 0.2, 0.12  # at most: degrees, pixels sideways a pixel up, share of a side
# What becomes of ink of each value under pens from narrow to wide.
PENS = [
    [round(255 * (value / 255) ** math.exp(power / 10)) for value in range(256)] for power in range(-5, 6)
]


@lru_cache(1)
def load_digits() -> tuple[list[Image.Image], str]:
    """Pictures (grey, ink bright, a dark border of 1 pixel around 8 x 8), and which digit each shows."""
    with Image.open(Path(__file__).with_name("digits.png")) as page:
        labels = page.info["Labels"]
        places = [divmod(number, ACROSS) for number in range(len(labels))]
        pictures = [
            page.crop((x * PIXELS, y * PIXELS, (x + 1) * PIXELS, (y + 1) * PIXELS)) for y, x in places
        ]
    framed = []
    for picture in pictures:
        frame = Image.new("L", (PIXELS + 2, PIXELS + 2))
        frame.paste(picture.point(lambda value: min(255, value * 17 // 16)), (1, 1))
        framed.append(frame)
    return framed, labels


def pick_digits(rng: random.Random, heldout: bool, count: int) -> list[int]:
    """Numbers of random digits of that split."""
    first, end = (TRAINING, len(load_digits()[1])) if heldout else (0, TRAINING)
    return [rng.randrange(first, end) for _ in range(count)]


def ink(number: int, side: float, rng: random.Random, written_anew: bool) -> Image.Image:
    """How much ink there is, 0 to 255: a digit whose 8 x 8 are `side` pixels wide.

    `written_anew`: turned, slanted, stretched, and with a pen of another width, as another hand might have.
    """
    picture = load_digits()[0][number]
    turn, slant, across, down = 0.0, 0.0, 1.0, 1.0
    if written_anew:
        turn, slant = math.radians(rng.uniform(-TURN, TURN)), rng.uniform(-SLANT, SLANT)
        across, down = (1 + rng.uniform(-STRETCH, STRETCH) for _ in range(2))
    pixels = round(side * (PIXELS + 2) / PIXELS)
    zoom, middle = PIXELS / side, (PIXELS + 2) / 2
    cos, sin = math.cos(turn) * zoom, math.sin(turn) * zoom
    xx, xy, yx, yy = cos / across, (sin + slant * cos) / across, -sin / down, (cos - slant * sin) / down
    x, y = middle - (xx + xy) * pixels / 2, middle - (yx + yy) * pixels / 2
    affine = xx, xy, x, yx, yy, y
    warped = picture.transform((pixels, pixels), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return warped.point(rng.choice(PENS)) if written_anew else warped
