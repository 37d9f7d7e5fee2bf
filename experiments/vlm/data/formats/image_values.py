"""The images that the records of a file name, and how their bytes are got. image_spelling.py has what a record may hold."""

import os
import posixpath
from typing import Any

import fsspec

from experiments.vlm.config import Data
from experiments.vlm.data.fetch import make_fetcher
from experiments.vlm.data.formats.draft import ImageValue
from experiments.vlm.data.formats.image_spelling import is_address, plain_value
from experiments.vlm.data.image import probe, probe_lazily
from experiments.vlm.data.rejects import Rejected


class ImageValues:
    """Images of the records of one file."""

    def __init__(self, record_file: str, data: Data):
        self.remote = "://" in record_file
        self.folder = record_file.rpartition("/")[0] if self.remote else os.path.dirname(os.path.abspath(record_file))
        self.fetcher = make_fetcher(data)

    def fetch_ahead(self, images: list[ImageValue]) -> None:
        self.fetcher.fetch_ahead(filter(None, (_address(image.value) for image in images)))

    def size(self, image: ImageValue) -> tuple[int, int]:
        """(height, width). Raises Rejected. Of a local file only the header is read."""
        value = plain_value(image.value)
        if isinstance(value, memoryview):
            return probe_lazily(lambda count: bytes(value[:count]), len(value))
        if self.remote or is_address(value):
            return probe(self._load(value))
        try:
            with open(self._path(value), "rb", buffering=0) as file:
                return probe_lazily(lambda count: os.pread(file.fileno(), count, 0), os.fstat(file.fileno()).st_size)
        except (OSError, ValueError) as error:
            raise Rejected("image_missing", str(error)) from error

    def load(self, value: Any) -> bytes:
        """The image's bytes. Raises Rejected."""
        return self._load(plain_value(value))

    def _load(self, value: memoryview | str) -> bytes:
        if isinstance(value, memoryview):
            return bytes(value)
        if is_address(value):
            return self.fetcher.fetch(value)
        path = self._path(value)
        try:
            with fsspec.open(path, "rb") if self.remote else open(path, "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:
            raise Rejected("image_missing", str(error)) from error

    def _path(self, value: str) -> str:
        """Below the record file's folder, by its letters: a link that somebody put there is followed."""
        join, norm = (posixpath.join, posixpath.normpath) if self.remote else (os.path.join, os.path.normpath)
        relative = norm(value if self.remote or not os.path.isabs(value) else os.path.relpath(value, self.folder))
        if relative.startswith(("..", "/")) or "\0" in relative:
            raise Rejected("image_outside", value[:200])
        return join(self.folder, relative)


def _address(value: Any) -> str | None:
    try:
        plain = plain_value(value)
    except Rejected:
        return None
    return plain if isinstance(plain, str) and is_address(plain) else None
