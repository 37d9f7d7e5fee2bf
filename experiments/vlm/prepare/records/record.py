"""The values that all kinds share: an image as the input names it, a record, a finished picture."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.vlm.data.formats.image_values import plain_value
from experiments.vlm.data.rejects import Rejected

HAS_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True)
class Reference:
    """An image as the input names it: exactly one of the three is set."""

    url: str = ""
    path: str = ""
    data: bytes | None = None

    @property
    def name(self) -> str:
        return self.url or self.path


@dataclass(frozen=True)
class Sources:
    """How to read a row: which columns, and where its paths begin. Empty: found by its usual names."""

    image_column: str = ""
    text_column: str = ""
    image_folder: str = ""


@dataclass(frozen=True)
class Record:
    references: list[Reference]
    payload: dict[str, Any]  # what the kind needs again to build the members


@dataclass(frozen=True)
class Picture:
    """An image as it goes into a shard."""

    data: bytes
    extension: str
    height: int  # pixels as a person sees it, after EXIF orientation
    width: int
    sha256: str  # of the bytes as they came


Pictures = Sequence[Picture | None]
Members = dict[str, bytes]


def reference(value: Any, sources: Sources) -> Reference:
    """A URL, a path below `image_folder`, bytes, or whatever else the loader takes for an image (image_values.py). Raises Rejected."""
    if isinstance(value, dict) and value.get("url") and not value.get("bytes"):
        value = value["url"]  # a path beside it tells where the image once was
    try:
        plain = plain_value(value)
    except Rejected as rejected:
        raise Rejected("wrong_shape", f"an image is a URL, a path or bytes, not {shown(value)}") from rejected
    if isinstance(plain, memoryview):
        return Reference(data=bytes(plain))
    is_path = sources.image_folder and not HAS_SCHEME.match(plain)
    return Reference(path=plain) if is_path else Reference(url=plain.strip())


def described(picture: Picture, source: Reference) -> dict[str, Any]:
    """What a shard's JSON says of an image."""
    where = {"url": source.url} if source.url else {"path": source.path} if source.path else {}
    return {**where, "height": picture.height, "width": picture.width, "sha256": picture.sha256}


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def to_json(value: Any) -> bytes:
    """Sorted and without spaces: the same value is the same bytes."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_spelled).encode("utf-8", "replace")


def _spelled(value: Any) -> str | None:
    """What parquet knows and JSON does not: dates and decimals as text, bytes left out."""
    return None if isinstance(value, bytes) else str(value)
