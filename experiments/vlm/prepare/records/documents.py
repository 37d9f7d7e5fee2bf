"""A document of texts and images in turn (OBELICS): KEY.json names its images, which are members of the same sample.

{"texts": ["A heron", null, "in the reeds."], "images": [null, "00000-00007.1.jpg", null],
 "metadata": [null, {"url": ..., "height": ..., "width": ..., "sha256": ...}, null], "general_metadata": ...}
"""

import json
from collections.abc import Mapping
from typing import Any

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.records.record import (
    Members,
    Pictures,
    Record,
    Sources,
    described,
    reference,
    shown,
    to_json,
)


def fits(row: Mapping) -> bool:
    return "texts" in row and "images" in row


def parse(row: Mapping, sources: Sources) -> Record:
    texts, images = row.get("texts"), row.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise Rejected("wrong_shape", "texts and images must be lists of one length")
    for index, (text, image) in enumerate(zip(texts, images, strict=True)):
        if not (text is None or isinstance(text, str)):
            raise Rejected("wrong_shape", f"texts[{index}] is {shown(text)}, not text")
        if text is not None and image is not None:
            raise Rejected("wrong_shape", f"position {index} has both a text and an image")
    payload = {
        "texts": texts,
        "places": [index for index, image in enumerate(images) if image is not None],
        "metadata": image_metadata(row.get("metadata"), len(images)),
        "general_metadata": row.get("general_metadata"),
    }
    return Record([reference(image, sources) for image in images if image is not None], payload)


def image_metadata(value: Any, length: int) -> list[dict]:
    """OBELICS' `metadata`: a JSON string of a list parallel to the images. Anything else tells nothing about images."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    entries = value if isinstance(value, list) and len(value) == length else [None] * length
    return [entry if isinstance(entry, dict) else {} for entry in entries]


def members(record: Record, key: str, pictures: Pictures) -> Members:
    """A picture that could not be had leaves no trace in the document; the text around it stays."""
    payload = record.payload
    had = zip(payload["places"], pictures, record.references, strict=True)
    kept = {place: (picture, source) for place, picture, source in had if picture}
    found: Members = {}
    texts: list[str | None] = []
    images: list[str | None] = []
    metadata: list[dict | None] = []
    for place, text in enumerate(payload["texts"]):
        if place in kept:
            picture, source = kept[place]
            name = f"{key}.{place}.{picture.extension}"
            found[name] = picture.data
            texts.append(None)
            images.append(name)
            metadata.append(payload["metadata"][place] | described(picture, source))
        elif text:
            texts.append(text)
            images.append(None)
            metadata.append(None)
    if not texts:
        raise Rejected("empty_document", "no text, and no image that could be had")
    value = {"texts": texts, "images": images, "metadata": metadata, "general_metadata": payload["general_metadata"]}
    return {f"{key}.json": to_json(value), **found}
