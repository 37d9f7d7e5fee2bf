"""What records hold in place of an image, and how its bytes are got.

b"..."                                  the bytes (in JSON: base64)
{"bytes": b"...", "path": "..."}        bytes, or where they are None the path (Hugging Face's Image feature)
{"url": "..."}                          an address
"images/1.jpg"                          a path below the record file's folder
"https://..." or "data:image/..."       an address, or the bytes themselves
"""

import base64
import binascii
import os
import posixpath
from typing import Any

import fsspec

from experiments.vlm.config import Data
from experiments.vlm.data.fetch import make_fetcher
from experiments.vlm.data.formats.draft import ImageValue
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
        value = _plain(image.value)
        if isinstance(value, memoryview):
            return probe_lazily(lambda count: bytes(value[:count]), len(value))
        if self.remote or _is_address(value):
            return probe(self._load(value))
        try:
            with open(self._path(value), "rb", buffering=0) as file:
                return probe_lazily(lambda count: os.pread(file.fileno(), count, 0), os.fstat(file.fileno()).st_size)
        except (OSError, ValueError) as error:
            raise Rejected("image_missing", str(error)) from error

    def load(self, value: Any) -> bytes:
        """The image's bytes. Raises Rejected."""
        return self._load(_plain(value))

    def _load(self, value: memoryview | str) -> bytes:
        if isinstance(value, memoryview):
            return bytes(value)
        if _is_address(value):
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
        plain = _plain(value)
    except Rejected:
        return None
    return plain if isinstance(plain, str) and _is_address(plain) else None


def _is_address(value: str) -> bool:
    return "://" in value[:12]


def _plain(value: Any) -> memoryview | str:
    """Bytes, or a path or address, out of whatever the record holds. Raises Rejected."""
    if isinstance(value, dict):
        found = [value[name] for name in ("bytes", "path", "url", "base64") if value.get(name) is not None]
        encoded = value.get("bytes") is not None or (len(found) == 1 and "base64" in value)
        value = found[0] if found else None
        if encoded and isinstance(value, str):
            return _from_base64(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return memoryview(value)
    if isinstance(value, str) and value.startswith("data:"):
        return _from_base64(value.partition(",")[2])
    if isinstance(value, str) and value:
        return value
    raise Rejected("image_missing", f"neither bytes, path nor address: {type(value).__name__}")


def _from_base64(text: str) -> memoryview:
    try:
        return memoryview(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise Rejected("image_undecodable", f"base64: {error}") from error
