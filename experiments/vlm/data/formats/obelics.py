"""OBELICS: documents of text and images in reading order (Hugging Face `HuggingFaceM4/OBELICS`).

In: a record of two lists. Out: a Draft, texts and images in their order, and what had no place.

    texts   ["A cat.", null,     "A dog."]
    images  [null,     IMAGE,    null    ]       exactly one of the two at each index

IMAGE is anything that image_values.py knows. Lists that do not match are taken as far as they make sense:
text always, an image where its place is known, which is an index of both lists where there is no text.
"""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from experiments.vlm.data.document import Draft, ImageValue, Text
from experiments.vlm.data.rejects import Rejected

IMAGES, TEXTS = ("images",), ("texts",)


def parse(record: Mapping[str, Any]) -> Draft:
    """Texts and images in order; `rejects` holds the images that had no place. Raises Rejected."""
    texts, images = _list(record, "texts", "images"), _list(record, "images", "texts")
    draft = Draft([])
    position = 0
    for index, (text, image) in enumerate(zip_longest(texts, images)):
        if text is not None and not isinstance(text, str):
            raise Rejected("wrong_shape", f"texts[{index}] is a {type(text).__name__}")
        if text is not None:
            draft.parts.append(Text(text))
        if image is None:
            continue
        if text is None and index < len(texts):
            draft.parts.append(ImageValue(image, position, ("images", index)))
        else:
            why = "there is text too" if text is not None else f"there are {len(texts)} text slots"
            draft.rejects.append(Rejected("image_unplaced", f"images[{index}]: {why}", image=position))
        position += 1
    return draft


def _list(record: Mapping[str, Any], name: str, other: str) -> list[Any]:
    value = record.get(name)
    if value is None and record.get(other) is not None:
        return []
    if not isinstance(value, list):
        raise Rejected("wrong_shape", f"{name} is a {type(value).__name__}, not a list")
    return value
