"""Conversations (LLaVA's `image` and `conversations`; `messages` with typed content): KEY.json is the record as it was, with
each image named by the member of the same sample that holds it.

    {"id": "7", "image": "00000-00007.0.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]}

A conversation about an image is nothing without it: one image that cannot be had rejects the record.
"""

from collections.abc import Callable, Mapping
from typing import Any

from experiments.vlm.data.formats.image_values import HELD_UNDER, IMAGE_ITEMS, held_image
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.records.record import Members, Pictures, Record, Sources, reference, to_json

TURNS = ("conversations", "messages")
IMAGE_KEYS = ("image", "images")
Rename = Callable[[Any], Any]


def fits(row: Mapping) -> bool:
    return any(name in row for name in TURNS)


def parse(row: Mapping, sources: Sources) -> Record:
    turns = next((row[name] for name in TURNS if row.get(name) is not None), None)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Rejected("wrong_shape", "conversations (or messages) must be a list of turns")
    values: list[Any] = []
    rename_images(row, values.append)
    return Record([reference(value, sources) for value in values], dict(row))


def members(record: Record, key: str, pictures: Pictures) -> Members:
    found: Members = {}
    for number, picture in enumerate(pictures):
        if picture is None:
            raise Rejected("image_missing", f"image {number} of {len(pictures)} could not be had")
        found[f"{key}.{number}.{picture.extension}"] = picture.data
    names = iter(list(found))
    return {f"{key}.json": to_json(rename_images(record.payload, lambda _: next(names))), **found}


def rename_images(row: Mapping, rename: Rename) -> dict:
    """The row with `rename(value)` in place of each image, in a fixed order: `image`, `images`, then those inside messages."""
    out = {name: value for name, value in row.items() if not isinstance(value, bytes) or name in IMAGE_KEYS}
    for name in IMAGE_KEYS:
        value = row.get(name)
        if isinstance(value, list):
            out[name] = [rename(image) for image in value]
        elif value is not None and value != "":
            out[name] = rename(value)
    if isinstance(row.get("messages"), list):
        out["messages"] = [rename_in_message(message, rename) for message in row["messages"]]
    return out


def rename_in_message(message: Any, rename: Rename) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    return {**message, "content": [rename_in_item(item, rename) for item in content]} if isinstance(content, list) else message


def rename_in_item(item: Any, rename: Rename) -> Any:
    """An image item may hold its image, under one of several names, or only mark its place."""
    held = held_image(item) if isinstance(item, dict) and item.get("type") in IMAGE_ITEMS else None
    if not held:
        return item
    return {name: value for name, value in item.items() if name not in HELD_UNDER} | {"type": "image", "image": rename(held)}
