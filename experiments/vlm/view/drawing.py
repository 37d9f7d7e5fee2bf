"""Colours and small pictures that the page and the PNG share."""

import base64
import colorsys
import io
import math

import numpy as np
from PIL import Image, ImageDraw

from experiments.vlm.view.slot_view import ImageView, Kind, SlotView

STRIP_COLUMNS = 256  # patches in a line of the strip
STRIP_PATCH = 4  # pixels a patch
EMPTY = (236, 239, 241)
KIND_COLOURS = {
    Kind.PADDING: "#f3f5f6",
    Kind.TARGET: "#a9d8b8",
    Kind.CONTEXT: "#c3cbd1",
    Kind.BOUNDARY: "#30343a",
}


def colour(number: int) -> str:
    """The colour of a number; neighbours differ: hues by the golden angle."""
    red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, 0.52, 0.62)
    return f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"


def png(pixels: np.ndarray | Image.Image) -> str:
    """An image as a data address."""
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(image: ImageView, height: int = 40) -> Image.Image:
    """An image, at most that high."""
    small = Image.fromarray(image.pixels)
    small.thumbnail((10_000, height))
    return small


def patch_strip(slot: SlotView, row: int) -> Image.Image:
    """A row of patches, in lines: the mean colour of each, underlined in the colour of its image."""
    colours = slot.patch_rows[row]
    lines = math.ceil(len(colours) / STRIP_COLUMNS)
    height = STRIP_PATCH + 3
    strip = Image.new("RGB", (min(len(colours), STRIP_COLUMNS) * STRIP_PATCH, lines * height), "white")
    draw = ImageDraw.Draw(strip)
    owners = patch_owners(slot, row)
    for patch, mean in enumerate(colours):
        x, y = patch % STRIP_COLUMNS * STRIP_PATCH, patch // STRIP_COLUMNS * height
        filled = EMPTY if np.isnan(mean[0]) else tuple(int(value) for value in mean)
        draw.rectangle((x, y, x + STRIP_PATCH - 1, y + STRIP_PATCH - 1), fill=filled)
        if owners[patch] >= 0:
            draw.rectangle(
                (x, y + STRIP_PATCH, x + STRIP_PATCH - 1, y + STRIP_PATCH + 1), fill=colour(owners[patch])
            )
    return strip


def patch_owners(slot: SlotView, row: int) -> np.ndarray:
    """int [L]: which image of the slot each patch of the row belongs to, -1 for none."""
    owners = np.full(len(slot.patch_rows[row]), -1)
    for number, image in enumerate(slot.images):
        if image.row == row:
            owners[image.first : image.first + image.h * image.w] = number
    return owners


def caption(number: int, image: ImageView, merge: int) -> str:
    """One line: the image's size and row in patches, its visual tokens, and the tokens that they replace."""
    visual = image.h * image.w // merge**2
    place = (
        f"tokens {image.tokens[0]} to {image.tokens[1] - 1} of document {image.document}"
        if image.tokens[0] >= 0
        else "no token points at it"
    )
    return (
        f"image {number}: {image.h} x {image.w} patches, row {image.row} from {image.first}; "
        f"visual tokens {image.visual} to {image.visual + visual - 1} at {place}"
    )
