"""Scenes to pictures, and to the bytes of image files."""

import io
import random

from PIL import Image

from experiments.vlm.world.scene import CELL, Scene
from experiments.vlm.world.sprites import sprite

GRAIN = 12  # pixels a speckle; coarse, so that files stay small


def render(scene: Scene) -> Image.Image:
    """The picture, RGB, [scene.height, scene.width]."""
    image = GROUNDS[scene.ground](scene)
    zoom = scene.cell / CELL
    for thing in scene.things:
        mask = sprite(thing.shape, round(thing.extent * zoom))
        x = (thing.column + 0.5) * scene.width / scene.columns + thing.shift[0] * zoom - mask.width / 2
        y = (thing.row + 0.5) * scene.height / scene.rows + thing.shift[1] * zoom - mask.height / 2
        image.paste(thing.rgb, (round(x), round(y)), mask)
    return image


def _flat(scene: Scene) -> Image.Image:
    return Image.new("RGB", (scene.width, scene.height), scene.background)


def _gradient(scene: Scene) -> Image.Image:
    ramp = Image.linear_gradient("L").resize((scene.width, scene.height))
    return Image.composite(_flat(scene), Image.new("RGB", ramp.size), ramp)


def _grain(scene: Scene) -> Image.Image:
    width, height = scene.width // GRAIN + 2, scene.height // GRAIN + 2
    noise = random.Random(repr(scene.background)).randbytes(width * height)
    speckles = Image.frombytes("L", (width, height), noise).resize((scene.width, scene.height))
    return Image.composite(_flat(scene), Image.new("RGB", speckles.size), speckles)


GROUNDS = {"flat": _flat, "gradient": _gradient, "grain": _grain}


def jpeg(image: Image.Image, quality: int) -> bytes:
    """The bytes of a JPEG file; `quality`: 1 to 100."""
    # Full colour resolution: halved, the edges of a small thing would bleed.
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file, compressed little, since speed counts for more than size."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
