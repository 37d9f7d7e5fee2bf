"""Tar shards in the WebDataset convention: captions (CC12M: `pixparse/cc12m-wds`) and interleaved documents.

KEY.jpg  KEY.txt  KEY.json      an image of any kind and its caption: the .txt, else "caption" or "text" of the .json
KEY.json  KEY.0.jpg  ...        {"texts": [...], "images": [...]} as in obelics.py; an image is the name of a member of the sample:
                                "KEY.0.jpg", also with the tar's folders before it, or "0.jpg"
"""

import os
import weakref
from collections.abc import Callable
from typing import Any

from experiments.vlm.config import Data, Source
from experiments.vlm.data.document import Document, Image, Text
from experiments.vlm.data.formats import ShardFile, obelics
from experiments.vlm.data.formats.draft import Draft, ImageValue, finish
from experiments.vlm.data.formats.spans import decode_utf8, parse_json, read_at
from experiments.vlm.data.formats.tar_index import Member, TarIndex
from experiments.vlm.data.image import probe_lazily
from experiments.vlm.data.rejects import Rejected

SUFFIXES = (".tar",)
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")

ParseSample = Callable[[list[Member], Callable[[Member], bytes]], Draft]  # a sample's members, and how to read one


def open_shard(file: ShardFile, source: Source, data: Data) -> "TarShard":
    return TarShard(file, parse)


class TarShard:
    """Implements formats.Shard. A key is the tar key; an image's locator the offset and size of its member."""

    def __init__(self, file: ShardFile, parse: ParseSample):
        self.file = os.open(file.local, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self.file)  # at the latest when nobody reads from it any more
        self.parse = parse
        self.index = TarIndex(self.file)
        self.rejects: list[Rejected] = [self.index.tail] if self.index.tail else []
        if self.rejects and not len(self.index):
            self.close()
            raise Rejected("shard_unreadable", self.rejects[0].detail)

    def __len__(self) -> int:
        return len(self.index)

    def key(self, index: int) -> str:
        return self.index.key(index)

    def read(self, index: int) -> tuple[Document, list[Rejected]]:
        members = self.index.sample(index)
        draft = self.parse(members, lambda member: read_at(self.file, member.offset, member.size))
        return finish(draft, members[0].key, self._size, lambda image: (image.value.offset, image.value.size))

    def _size(self, image: ImageValue) -> tuple[int, int]:
        member = image.value
        if not isinstance(member, Member):
            raise Rejected("image_missing", f"no member {str(member)[:200]} in the sample")
        return probe_lazily(lambda count: read_at(self.file, member.offset, count), member.size)

    def load(self, image: Image) -> bytes:
        return read_at(self.file, *image.locator)


def parse(members: list[Member], read: Callable[[Member], bytes]) -> Draft:
    """A caption with its image, or an interleaved document. Raises Rejected."""
    text, record = _find(members, ("txt",)), _find(members, ("json",))
    content = parse_json(read(record)) if record and not text else None
    if isinstance(content, dict) and ("texts" in content or "images" in content):
        return _interleaved(content, members)
    image = _find(members, IMAGE_EXTENSIONS)
    if not image:
        raise Rejected("image_missing", f"no image among {', '.join(member.name for member in members)[:200]}")
    return Draft([ImageValue(image), Text(_caption(read(text) if text else b"", content))], caption=True)


def _caption(text: bytes, content: Any) -> str:
    caption = decode_utf8(text)
    if isinstance(content, dict):
        caption = next((content[name] for name in ("caption", "text") if content.get(name)), "")
    if not isinstance(caption, str):
        raise Rejected("wrong_shape", f"the caption is a {type(caption).__name__}")
    if not caption or caption.isspace():
        raise Rejected("caption_missing")
    return caption


def _interleaved(content: dict[str, Any], members: list[Member]) -> Draft:
    draft = obelics.parse(content)
    named = {name: member for member in members for name in (member.extension, os.path.basename(member.name), member.name)}
    for place, part in enumerate(draft.parts):
        if isinstance(part, ImageValue):
            name = part.value.get("path") if isinstance(part.value, dict) else part.value
            draft.parts[place] = ImageValue(named.get(name, name) if isinstance(name, str) else name, part.position)
    return draft


def _find(members: list[Member], extensions: tuple[str, ...]) -> Member | None:
    """The member with one of the extensions; "KEY.jpg" before "KEY.0.jpg"."""
    whole = (member for member in members if member.extension in extensions)
    last = (member for member in members if member.extension.rpartition(".")[2] in extensions)
    return next(whole, None) or next(last, None)
