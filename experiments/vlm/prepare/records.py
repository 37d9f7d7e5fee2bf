"""What a record becomes in a shard: the members of its sample, name -> bytes.

captions    KEY.jpg, KEY.txt, KEY.json (the layout of CC12M)
obelics     KEY.json names its images, which are members of the same sample:
            {"texts": ["A heron", null, "in the reeds."], "images": [null, "00000-00007.1.jpg", null],
             "metadata": [null, {"url": ..., "height": ..., "width": ..., "sha256": ...}, null],
             "general_metadata": ...}
mmc4        the same: sentences are texts, and each image stands before its sentence
llava, messages, finevision    KEY.json is the record as it was, with the member's name in place of each image
text        KEY.json is the record as it was
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from experiments.vlm.data.document import Document, Image, ImageValue, Text
from experiments.vlm.data.formats import Record
from experiments.vlm.data.formats.image_values import HELD_UNDER, is_address, name_of
from experiments.vlm.prepare.images import FinishedImage

Members = dict[str, bytes]
Place = tuple[str | int, ...]


def captions(record: Record, document: Document, key: str) -> Members:
    """An image, its caption and what else the record says, as KEY.jpg, KEY.txt and KEY.json."""
    ((value, image),) = _images_in(document)
    (caption,) = (part.text for part in document.parts if isinstance(part, Text))
    other = {name: value for name, value in record.items() if _is_plain(value) and value != caption}
    other.pop(str(value.place[0]), None)
    return {
        f"{key}.{image.extension}": image.data,
        f"{key}.txt": caption.encode("utf-8", "replace"),
        f"{key}.json": to_json({**other, "caption": caption} | described(value, image)),
    }


def obelics(record: Record, document: Document, key: str) -> Members:
    """The lists of the record with members' names in place of its images."""
    metadata = image_metadata(record)
    found: Members = {}
    columns: list[tuple[str | None, str | None, dict | None]] = []  # of texts, images, metadata
    for part in document.parts:
        if isinstance(part, Image):
            value, image = part.locator
            index = value.place[-1]
            name = f"{key}.{index}.{image.extension}"
            found[name] = image.data
            columns.append((None, name, metadata.get(index, {}) | described(value, image)))
        elif isinstance(part, Text):
            columns.append((part.text, None, None))
    lists = dict(zip(("texts", "images", "metadata"), map(list, zip(*columns, strict=True)), strict=True))
    return {f"{key}.json": to_json({**lists, "general_metadata": record.get("general_metadata")}), **found}


def mmc4(record: Record, document: Document, key: str) -> Members:
    """As `obelics`, with what the record says of the page."""
    page = {name: value for name, value in record.items() if _is_plain(value)}
    return obelics({"general_metadata": page}, document, key)


def image_metadata(record: Record) -> dict[int, dict]:
    """OBELICS' `metadata` by index: a list parallel to the images, or JSON of one. Else nothing."""
    value = record.get("metadata")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list) or len(value) != len(record.get("images") or []):
        return {}
    return {index: entry for index, entry in enumerate(value) if isinstance(entry, dict)}


def conversation(record: Record, document: Document, key: str) -> Members:
    """The record with members' names in place of its images."""
    names: dict[Place, str] = {}
    found: Members = {}
    for value, image in _images_in(document):
        if value.place not in names:
            names[value.place] = f"{key}.{len(names)}.{image.extension}"
            found[names[value.place]] = image.data
    fields = {place[0] for place in names if len(place) == 1} - {"image"}
    if fields:  # called like image files, as the members of the sample are
        record = {name: value for name, value in record.items() if name not in fields} | {
            "images": list(names.values())
        }
    return {f"{key}.json": to_json(renamed(record, names)), **found}


def renamed(value: Any, names: dict[Place, str], place: Place = ()) -> Any:
    """The record with a member's name in place of each image; in items of messages under "image"."""
    if place in names and place[0] == "messages":
        return {name: value[name] for name in value if name not in HELD_UNDER} | {
            "type": "image",
            "image": names[place],
        }
    if place in names:
        return names[place]
    if isinstance(value, dict):
        return {name: renamed(inner, names, (*place, name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [renamed(inner, names, (*place, index)) for index, inner in enumerate(value)]
    return value


def text(record: Record, document: Document, key: str) -> Members:
    """The record as it was, as KEY.json."""
    return {f"{key}.json": to_json(record)}


MEMBERS: dict[str, Callable[[Record, Document, str], Members]] = {
    "llava": conversation,
    "messages": conversation,
    "finevision": conversation,
    "obelics": obelics,
    "mmc4": mmc4,
    "captions": captions,
    "text": text,
}


def _images_in(document: Document) -> Iterator[tuple[ImageValue, FinishedImage]]:
    return (part.locator for part in document.parts if isinstance(part, Image))


def described(value: ImageValue, image: FinishedImage) -> dict[str, Any]:
    """What a shard's JSON says of an image."""
    name = name_of(value.value)
    where = {"url" if is_address(name) else "path": name} if name else {}
    return {**where, "height": image.height, "width": image.width, "sha256": image.sha256}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def to_json(value: Any) -> bytes:
    """Sorted and without spaces: the same value is the same bytes."""
    return json.dumps(
        value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_spelled
    ).encode("utf-8", "replace")


def _spelled(value: Any) -> str | None:
    """What parquet knows and JSON does not: dates and decimals as text, bytes left out."""
    return None if isinstance(value, bytes | memoryview) else str(value)
