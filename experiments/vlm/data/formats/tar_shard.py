"""A tar shard and a function from a sample's members to a draft; record formats in tars.

KEY.json  KEY.0.jpg  ...    the record of any format that has a parser; an image is the name of a member of the sample:
                            "KEY.0.jpg", also with the tar's folders before it, or "0.jpg". A conversation that names none
                            has the sample's images in the order of the tar
"""

import os
import weakref
from collections.abc import Callable
from typing import Any

from experiments.vlm.data.document import Document, Image
from experiments.vlm.data.formats import ShardFile
from experiments.vlm.data.formats.draft import Draft, ImageValue, finish
from experiments.vlm.data.formats.spans import parse_object, read_at
from experiments.vlm.data.formats.tar_index import Member, TarIndex
from experiments.vlm.data.image import probe_lazily
from experiments.vlm.data.rejects import Rejected

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")

Read = Callable[[Member], bytes]
Parse = Callable[[dict[str, Any]], Draft]  # a record
ParseSample = Callable[[list[Member], Read], Draft]  # a sample's members, and how to read one


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


def is_tar(path: str) -> bool:
    with open(path, "rb") as file:
        return path.endswith(".tar") or file.read(512)[257:262] == b"ustar"


def record_parser(parse: Parse) -> ParseSample:
    """Parses samples whose record is KEY.json."""

    def parse_members(members: list[Member], read: Read) -> Draft:
        record = next((member for member in members if member.extension == "json"), None)
        if not record:
            raise Rejected("wrong_shape", f"no .json among {', '.join(member.name for member in members)[:200]}")
        return parse_with_members(parse, parse_object(read(record)), members)

    return parse_members


def parse_with_members(parse: Parse, record: dict[str, Any], members: list[Member]) -> Draft:
    """The draft of a record that lies in a tar with its images."""
    return name_members(parse(_with_images(record, members)), members)


def _with_images(record: dict[str, Any], members: list[Member]) -> dict[str, Any]:
    if record.get("image") is not None or record.get("images") is not None or record.keys().isdisjoint(("conversations", "messages")):
        return record
    return record | {"images": [member.name for member in members if member.kind in IMAGE_EXTENSIONS]}


def name_members(draft: Draft, members: list[Member]) -> Draft:
    """The draft with each image's name replaced by the member that bears it; `TarShard` rejects those without."""
    named = {name.lower(): member for member in members for name in (member.extension, os.path.basename(member.name), member.name)}
    for place, part in enumerate(draft.parts):
        if isinstance(part, ImageValue):
            value = part.value
            name = value.get("path") or value.get("url") if isinstance(value, dict) else value
            member = named.get(name.removeprefix("./").lower(), name) if isinstance(name, str) else name
            draft.parts[place] = ImageValue(member, part.position)
    return draft
