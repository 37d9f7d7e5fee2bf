"""A file of records as a shard, and how their images are got: inside, below a folder, or by address.

Imports torch only to look at an image, since data preparation plans without it.
"""

import json
import os
import posixpath
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

from experiments.vlm.config import Data
from experiments.vlm.data.document import Document, Draft, Image, ImageValue, finish
from experiments.vlm.data.formats import Record
from experiments.vlm.data.formats.image_values import file_or_address, is_address, name_of, plain_value
from experiments.vlm.data.formats.record_files import Records
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.fetch import make_fetcher
from experiments.vlm.data.storage.outages import Away, is_away, remote, retried
from experiments.vlm.data.storage.remote import is_file, open_file

T = TypeVar("T")


def folder_of(record_file: str) -> str:
    """Where the paths of a record file begin."""
    if "://" in record_file:
        return record_file.rpartition("/")[0]
    return os.path.dirname(os.path.abspath(record_file))


class ImageFolder:
    """Images by their paths below a folder, local or remote."""

    def __init__(self, folder: str):
        self.folder = folder
        self.remote = "://" in folder

    def path(self, value: str) -> str:
        """Where the image lies: below the folder by its letters, links followed. Raises Rejected."""
        join, norm = (posixpath.join, posixpath.normpath) if self.remote else (os.path.join, os.path.normpath)
        relative = norm(
            value if self.remote or not os.path.isabs(value) else os.path.relpath(value, self.folder)
        )
        if relative.startswith(("..", "/")) or "\0" in relative:
            raise Rejected("image_outside", value[:200])
        return join(self.folder, relative)

    def has(self, value: str) -> bool:
        """Whether there is such a file. Raises OSError where the storage does not answer."""
        try:
            path = self.path(value)
            return retried(path, lambda: is_file(path) if self.remote else S_ISREG(os.stat(path).st_mode))
        except (Rejected, OSError, ValueError) as error:
            if is_away(error):
                raise
            return False

    def settle(self, draft: Draft) -> Draft:
        """With a file where an image is one that is here, or else an address (image_values.py)."""
        draft.parts = [self.settled(part) if isinstance(part, ImageValue) else part for part in draft.parts]
        return draft

    def settled(self, image: ImageValue) -> ImageValue:
        """The same of one image."""
        name = file_or_address(image.value)
        return replace(image, value={"path": name}) if name and self.has(name) else image

    def read(self, value: str) -> bytes:
        """Raises Rejected, and OSError where the storage does not answer."""
        path = self.path(value)
        return _found(path, lambda: _download(path) if self.remote else Path(path).read_bytes())


def _found(path: str, read: Callable[[], T]) -> T:
    """What `read` makes of a file. Raises Rejected, and OSError where the storage does not answer."""
    try:
        return retried(path, read)
    except (OSError, ValueError) as error:
        if is_away(error):
            raise
        raise Rejected("image_missing", str(error)) from error


def _download(path: str) -> bytes:
    with remote():
        try:
            with open_file(path) as file:
                data, size = file.read(), getattr(file, "size", None)
        except json.JSONDecodeError:
            raise  # of an answer
        except ValueError as error:  # of a name that no file can have: records hold what they like
            raise FileNotFoundError(str(error)) from error
        if size is not None and len(data) != size:
            raise Away(f"{len(data)} of {size} bytes came")
        return data


class ImageValues:
    """Images of the records of one file, whose paths begin at `folder`."""

    def __init__(self, folder: str, data: Data):
        self.folder = ImageFolder(folder)
        self.fetcher = make_fetcher(data)

    def fetch_ahead(self, images: list[ImageValue]) -> None:
        """Begin to fetch those that are addresses, all at once; `size` and `load` wait for them."""
        self.fetcher.fetch_ahead(filter(is_address, (name_of(image.value) for image in images)))

    def size(self, image: ImageValue) -> tuple[int, int]:
        """(height, width). Raises Rejected. Only the header of a local file is read."""
        from experiments.vlm.data.image import probe, probe_lazily

        value = plain_value(image.value)
        if isinstance(value, memoryview):
            return probe_lazily(lambda count: bytes(value[:count]), len(value))
        if self.folder.remote or is_address(value):
            return probe(self.load(value))
        path = self.folder.path(value)

        def look() -> tuple[int, int]:
            with open(path, "rb", buffering=0) as file:
                return probe_lazily(
                    lambda count: os.pread(file.fileno(), count, 0), os.fstat(file.fileno()).st_size
                )

        return _found(path, look)

    def load(self, value: Any) -> bytes:
        """The image's bytes. Raises Rejected."""
        plain = plain_value(value)
        if isinstance(plain, memoryview):
            return bytes(plain)
        return self.fetcher.fetch(plain) if is_address(plain) else self.folder.read(plain)


class RecordShard:
    """Implements Shard. A key is the record's number; an image's locator that and its place in the record."""

    def __init__(
        self,
        records: Records,
        images: ImageValues,
        parse: Callable[[Record], Draft],
        speak: Callable[[Draft], Draft],
        checksum: int,
    ):
        """speak: turns to parts, by a chat template. checksum: of the file."""
        self.records = records
        self.images = images
        self.parse = parse
        self.speak = speak
        self.checksum = checksum
        self.rejects: list[Rejected] = [records.tail] if records.tail else []

    def __len__(self) -> int:
        return len(self.records)

    def key(self, index: int) -> str:
        """The number of the record, since a file of records names none."""
        return str(index)

    def read(self, index: int) -> tuple[Document, list[Rejected]]:
        """See Shard.read."""
        draft = self.images.folder.settle(self.speak(self.parse(self.records.get(index))))
        self.images.fetch_ahead(draft.images())
        return finish(draft, self.key(index), self.images.size, lambda image: (index, image.position))

    def load(self, image: Image) -> bytes:
        """See Shard.load. The record is read again, and its image of that place taken."""
        index, position = image.locator
        draft = self.parse(self.records.get(index))
        found = next((found for found in draft.images() if found.position == position), None)
        if found is None:
            raise Rejected("image_missing", "the record has changed since it was read")
        return self.images.load(self.images.folder.settled(found).value)

    def close(self) -> None:
        """Closes the file of records."""
        self.records.close()
