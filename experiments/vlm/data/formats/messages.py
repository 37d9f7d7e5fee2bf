"""Hugging Face conversations: JSON lines, a JSON list, parquet or Arrow of

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}],
     "images": [IMAGE]}

A content is a string (where `<image>` stands for the record's next image) or a list of typed items. An image item holds its image under
"image", "image_url", "url", "path", "bytes" or "base64", or it is the record's next one (or that of "index"). See image_spelling.py.
"""

import functools
from typing import Any

from experiments.vlm.config import Data, Source
from experiments.vlm.data.chat_template import ChatTemplate, Turn, load_chat_template
from experiments.vlm.data.formats import Shard, ShardFile
from experiments.vlm.data.formats.conversation import make_draft, place_images
from experiments.vlm.data.formats.draft import Draft, ImageValue
from experiments.vlm.data.formats.image_spelling import IMAGE_ITEMS, held_image
from experiments.vlm.data.formats.llava import images_of
from experiments.vlm.data.formats.record_shard import SUFFIXES as SUFFIXES
from experiments.vlm.data.formats.record_shard import open_record_shard
from experiments.vlm.data.rejects import Rejected

COLUMNS = ("messages", "image", "images")
ROLES = ("system", "user", "assistant", "tool", "developer")


def open_shard(file: ShardFile, source: Source, data: Data) -> Shard:
    return open_record_shard(file, data, COLUMNS, functools.partial(parse, template=load_chat_template(source.chat_template)))


def parse(record: dict[str, Any], template: ChatTemplate) -> Draft:
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise Rejected("wrong_shape", f"messages is a {type(messages).__name__}, not a list")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Rejected("wrong_shape", f"messages[{number}] has no role of {', '.join(ROLES)}")
    if all(isinstance(message.get("content"), str) for message in messages):
        turns, rejects = place_images([(message["role"], message["content"]) for message in messages], images_of(record))
        return make_draft(turns, template, rejects)
    return _parse_items(messages, images_of(record), template)


def _parse_items(messages: list[dict[str, Any]], images: list[Any], template: ChatTemplate) -> Draft:
    found = _Images(images)
    turns = [Turn(message["role"], [found.part(item) for item in _items(message)]) for message in messages]
    return make_draft(turns, template, found.unused())


def _items(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise Rejected("wrong_shape", f"a content is a {type(content).__name__}: neither text nor a list of typed items")
    return content


class _Images:
    """Gives each image item its image: its own, or the record's next."""

    def __init__(self, images: list[Any]):
        self._images = images
        self._next = 0
        self._count = 0
        self._used: set[int] = set()

    def part(self, item: dict[str, Any]) -> str | ImageValue:
        if item.get("type") == "text":
            if not isinstance(item.get("text"), str):
                raise Rejected("wrong_shape", "a text item without text")
            return item["text"]
        if item.get("type") not in IMAGE_ITEMS:
            raise Rejected("wrong_shape", f"an item of type {item.get('type')}")
        self._count += 1
        return ImageValue(held_image(item) or self._take(item.get("index")), self._count - 1)

    def _take(self, index: Any) -> Any:
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
        return [Rejected("image_unplaced", f"images[{number}] is in no message", image=number) for number in left]
