"""A tar shard: each sample is a record, so any format that parses records reads it.

KEY.json                    its object's fields are the record's
KEY.txt                     the field "txt"; KEY.json is not read where it says something and is wanted
KEY.jpg  KEY.0.jpg  ...     the fields "jpg", "0.jpg", ...: members: images where the record says so. A record
                            may also name them: see tar_images.py; or hold their bytes as base64
"""

import os
import weakref
from collections.abc import Callable
from typing import Any

from experiments.vlm.data.document import Document, Draft, Image, ImageValue, finish
from experiments.vlm.data.formats.image_values import IMAGE_EXTENSIONS, held_bytes, is_image_name
from experiments.vlm.data.formats.json_index import decode_utf8, parse_object, read_at
from experiments.vlm.data.formats.tar_header import Member
from experiments.vlm.data.formats.tar_images import PageOf, SampleImages, resolve
from experiments.vlm.data.formats.tar_index import open_index
from experiments.vlm.data.formats.tiff_pages import Page, only
from experiments.vlm.data.formats.tiff_pages import pages as pages_of
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.file_cache import FileCache

IN_RECORD = -1  # in place of an offset: the number of the record and the position in it follow


class TarShard:
    """Implements shard.Shard. A key is the tar key; an image's locator the offset and size of its member,
    and of a page of a TIFF where its tags begin, or the place in the record that holds its bytes.
    """

    def __init__(
        self,
        path: str,
        columns: tuple[str, ...],
        parse: Callable[[dict[str, Any]], Draft],
        cache: FileCache,
    ):
        """columns: what `parse` reads of a record. cache: for the index."""
        self.file = os.open(path, os.O_RDONLY)
        # at the latest when nobody reads from it any more
        self.close = weakref.finalize(self, os.close, self.file)
        self.wants_text = "txt" in columns
        self.wants_images = not {"images", *IMAGE_EXTENSIONS}.isdisjoint(columns)
        self.parse = parse
        self.excluded: frozenset[str] = frozenset()  # keys of samples that are not to be used
        self.index = open_index(self.file, path, cache)
        self.checksum = self.index.found.checksum
        self.rejects: list[Rejected] = [self.index.damage] if self.index.damage else []
        if self.rejects and not len(self.index):
            self.close()
            raise Rejected("shard_unreadable", self.rejects[0].detail)

    def __len__(self) -> int:
        return len(self.index)

    def key(self, index: int) -> str:
        """What the names of the sample's members begin with, up to the first dot."""
        return self.index.key(index)

    def read(self, index: int) -> tuple[Document, list[Rejected]]:
        """See Shard.read."""
        members = self.index.sample(index)
        if members[0].key in self.excluded:
            raise Rejected("excluded")
        record = self._record(members)
        draft = self.parse(record)
        resolve(draft, SampleImages(members, record, self._pages), self.wants_images)
        return finish(draft, members[0].key, self._size, lambda image: _locator(image, index))

    def load(self, image: Image) -> bytes:
        """See Shard.load."""
        offset, size, *tags = image.locator
        if offset == IN_RECORD:
            draft = self.parse(self._record(self.index.sample(size)))
            (value,) = (image.value for image in draft.images() if image.position == tags[0])
            return bytes(held_bytes(value) or b"")
        data = read_at(self.file, offset, size)
        return only(data, *tags) if tags else data

    def _record(self, members: list[Member]) -> dict[str, Any]:
        record: dict[str, Any] = {
            member.extension: member for member in members if is_image_name(member.extension)
        }
        text, fields = (_find(members, kind) for kind in ("txt", "json"))
        if text and self.wants_text:
            record |= {member.extension: member for member in members if member.kind == "txt"}
            record["txt"] = decode_utf8(self._read(text))
        if fields and not record.get("txt", "").strip():
            record = {**parse_object(self._read(fields)), **record}
        return record

    def _read(self, member: Member) -> bytes:
        return read_at(self.file, member.offset, member.size)

    def _size(self, image: ImageValue) -> tuple[int, int]:
        from experiments.vlm.data.image import probe_lazily

        found = image.value
        if isinstance(found, Rejected):
            raise found
        if isinstance(found, PageOf):
            return found.page.height, found.page.width
        if isinstance(found, memoryview):
            return probe_lazily(lambda count: bytes(found[:count]), len(found))
        return probe_lazily(lambda count: read_at(self.file, found.offset, count), found.size)

    def _pages(self, tiff: Member) -> list[Page]:
        def read(offset: int, size: int) -> bytes:
            if offset + size > tiff.size:
                raise Rejected("image_truncated", f"its tags at byte {offset} are behind its end")
            return read_at(self.file, tiff.offset + offset, size)

        return pages_of(read)


def _locator(image: ImageValue, index: int) -> tuple[int, ...]:
    """Offset and size of a member; of a page also its tags; of bytes in a record, their place in it."""
    found = image.value
    if isinstance(found, memoryview):
        return IN_RECORD, index, image.position
    if isinstance(found, PageOf):
        return found.member.offset, found.member.size, found.page.tags
    return found.offset, found.size


def is_tar(path: str) -> bool:
    """By its name or its content. Raises OSError."""
    with open(path, "rb") as file:
        return path.lower().endswith(".tar") or file.read(512)[257:262] == b"ustar"


def _find(members: list[Member], kind: str) -> Member | None:
    """The member with this extension; "KEY.txt" before "KEY.0.txt"."""
    whole = (member for member in members if member.extension == kind)
    last = (member for member in members if member.kind == kind)
    return next(whole, None) or next(last, None)
