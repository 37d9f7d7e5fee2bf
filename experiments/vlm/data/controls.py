"""Controls of a validation: does the model look at the image, or guess from the text?

blanked    every image is mid-grey, at its own size
shuffled   a sample gets the images of another sample of its shard, at their own sizes
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from experiments.vlm.data.document import Document, Image
from experiments.vlm.data.formats.shard import Shard
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.reader import Control
from experiments.vlm.data.sources.shard_cache import guarded

NEIGHBOURS = 32  # records that are tried for images before a sample is blanked instead


@dataclass(frozen=True)
class Painted:
    """Locator of an image that is not loaded but painted."""

    paint: Callable[[int, int], np.ndarray]  # (height, width) -> uint8 [height, width, 3]


def grey(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3], mid-grey."""
    return np.full((height, width, 3), 128, np.uint8)  # 0.004 after normalisation


def blanked(document: Document, shard: Shard, record: int) -> Document:
    """The document with every image painted mid-grey."""
    return _with_images(document, (replace(image, locator=Painted(grey)) for image in _images(document)))


def shuffled(document: Document, shard: Shard, record: int) -> Document:
    """Its images are, in turn, those of a record half a shard away, or of the next one that has any."""
    if not _images(document):
        return document
    images = _images_of_another(shard, record)
    return _with_images(document, itertools.cycle(images)) if images else blanked(document, shard, record)


def _images(document: Document) -> list[Image]:
    return [part for part in document.parts if isinstance(part, Image)]


def _with_images(document: Document, images: Iterator[Image]) -> Document:
    parts = [next(images) if isinstance(part, Image) else part for part in document.parts]
    return replace(document, parts=parts)


def _images_of_another(shard: Shard, record: int) -> list[Image]:
    count = len(shard)
    for step in range(min(count, NEIGHBOURS)):
        other = (record + count // 2 + step) % count
        if other == record:
            continue
        try:
            document, _ = guarded(shard.read, other)
        except Rejected:
            continue
        if images := _images(document):
            return images
    return []


# Name -> what it makes of a document. A new control is a row: validation.controls goes through all of them.
CONTROLS: dict[str, Control] = {"blanked": blanked, "shuffled": shuffled}
