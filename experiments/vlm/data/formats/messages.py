"""Hugging Face conversations:

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}],
     "images": [IMAGE]}

A content is a string (where `<image>` stands for the record's next image) or a list of typed items. An image
item holds its image under one of HELD_UNDER, or it is the record's next one (or that of "index"). See
image_values.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from experiments.vlm.data.document import Draft, ImageValue, Turn
from experiments.vlm.data.formats.conversation import images_of, make_draft, place_images
from experiments.vlm.data.formats.image_values import IMAGE_EXTENSIONS, IMAGE_ITEMS, held_image
from experiments.vlm.data.rejects import Rejected

IMAGES, TEXTS = ("images", "image", *IMAGE_EXTENSIONS), ("messages",)
ROLES = ("system", "user", "assistant", "tool", "developer")


def parse(record: Mapping[str, Any]) -> Draft:
    """Turns of text and images; loss falls on the assistant's. Raises Rejected."""
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise Rejected("wrong_shape", f"messages is a {type(messages).__name__}, not a list")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Rejected("wrong_shape", f"messages[{number}] has no role of {', '.join(ROLES)}")
    if all(isinstance(message.get("content"), str) for message in messages):
        turns, rejects = place_images(
            [(message["role"], message["content"]) for message in messages], images_of(record)
        )
        return make_draft(turns, rejects)
    found = _Images(images_of(record))
    turns = [_turn(message, number, found) for number, message in enumerate(messages)]
    return make_draft(turns, found.unused())


def _turn(message: dict[str, Any], number: int, images: "_Images") -> Turn:
    place, items = ("messages", number, "content"), enumerate(_items(message))
    return Turn(message["role"], [images.part(item, (*place, index)) for index, item in items])


def _items(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise Rejected(
            "wrong_shape", f"a content is a {type(content).__name__}: neither text nor a list of typed items"
        )
    return content


class _Images:
    """Gives each image item its image: its own, or the record's next."""

    def __init__(self, images: list[ImageValue]):
        self._images = images
        self._next = 0
        self._count = 0
        self._used: set[int] = set()

    def part(self, item: dict[str, Any], place: tuple[str | int, ...]) -> str | ImageValue:
        if item.get("type") == "text":
            if not isinstance(item.get("text"), str):
                raise Rejected("wrong_shape", "a text item without text")
            return item["text"]
        if item.get("type") not in IMAGE_ITEMS:
            raise Rejected("wrong_shape", f"an item of type {item.get('type')}")
        held = held_image(item)
        image = ImageValue(held, 0, place) if held else self._take(item.get("index"))
        self._count += 1
        return replace(image, position=self._count - 1)

    def _take(self, index: Any) -> ImageValue:
        number = index if isinstance(index, int) else self._next
        if not 0 <= number < len(self._images):
            raise Rejected("image_missing", f"an image item, but the record has {len(self._images)} images")
        self._next = number + 1
        self._used.add(number)
        return self._images[number]

    def unused(self) -> list[Rejected]:
        if self._count and not self._used:
            return []  # the items hold their images: the record only lists them once more
        left = [number for number in range(len(self._images)) if number not in self._used]
        return [
            Rejected("image_unplaced", f"images[{number}] is in no message", image=number) for number in left
        ]
