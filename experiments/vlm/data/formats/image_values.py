"""What a record may hold in place of an image.

b"..."                                  the bytes (in JSON: base64)
{"bytes": b"...", "path": "..."}        bytes, or where they are None the path (Hugging Face's Image feature)
{"url": "...", "path": "..."}           an address; a path next to it says where the image once was
"images/1.jpg"                          a path below the record file's folder
"https://..." or "data:image/..."       an address, or the bytes themselves
"/9j/4AAQ..."                           the bytes as base64: of JPEG, PNG, WebP or GIF, known by how it begins
{"image_name": "1.jpg", "raw_url": "https://..."}    an entry of MMC4: the file where there is one below that
                                        folder, else the address; or the bytes, {"image_base64": "..."}

An item of a message holds one of these under a name of HELD_UNDER. A record of a tar holds the members
themselves, and names them by their extension or their name (tar_shard.py).
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from experiments.vlm.data.rejects import Rejected

JPEG_2000 = ("jp2", "j2k", "jpx", "jpf", "jpc", "j2c")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", *JPEG_2000)
IMAGE_ITEMS = ("image", "image_url")  # types of items
HELD_UNDER = ("image", "image_url", "url", "path", "bytes", "base64")
BASE64 = ("bytes", "base64", "image_base64")  # fields whose text is base64
BASE64_BEGINS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")  # a file of that name would have an extension
FIELDS = ("bytes", "url", "path", "base64", "image_base64", "raw_url", "image_name")  # the first that is set


def split_name(name: str) -> tuple[str, str]:
    """Before and after the last dot of a field's name or an extension: ("0", "jpg"), ("", "txt")."""
    part, _, kind = name.rpartition(".")
    return part, kind


def is_image_name(name: str) -> bool:
    """Whether a field is called like an image file."""
    return name.rpartition(".")[2] in IMAGE_EXTENSIONS


def image_fields(record: Mapping[str, Any]) -> list[str]:
    """The fields of a record that are called like image files and hold something."""
    return [name for name in record if is_image_name(name) and record[name] is not None]


def held_image(item: dict[str, Any]) -> Any:
    """What an image item says of its image; nothing where it only marks the place of one."""
    own = {name: item[name] for name in HELD_UNDER if item.get(name) is not None}
    return next((own[name] for name in ("image", "image_url") if name in own), own)


def is_address(value: str) -> bool:
    """Whether a plain value is an address, fetched or not (the client decides); else it is a path."""
    return "://" in value[:12]


def file_or_address(value: Any) -> str:
    """The file that an entry of MMC4 may lie in; empty where it is another value, or holds the bytes."""
    is_entry = isinstance(value, dict) and _field_of(value) in ("raw_url", "image_name")
    name = value.get("image_name") if is_entry else None
    return name if isinstance(name, str) else ""


def _field_of(value: dict[str, Any]) -> str:
    return next((name for name in FIELDS if value.get(name) is not None), "")


def held_bytes(value: Any) -> memoryview | None:
    """The bytes, where the record holds them itself. Raises Rejected where they cannot be read."""
    plain = plain_value(value)
    return plain if isinstance(plain, memoryview) else None


def plain_value(value: Any) -> memoryview | str:
    """Bytes, or a path or address, out of whatever the record holds. Raises Rejected."""
    if isinstance(value, dict):
        name = _field_of(value)
        value = value.get(name)
        if name in BASE64 and isinstance(value, str):
            return _from_base64(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return memoryview(value)
    if isinstance(value, str) and value.startswith("data:"):
        return _from_base64(value.partition(",")[2])
    if isinstance(value, str) and value.startswith(BASE64_BEGINS) and "." not in value:
        return _from_base64(value)
    if isinstance(value, str) and value:
        return value
    raise Rejected("image_missing", f"neither bytes, path nor address: {type(value).__name__}")


def name_of(value: Any) -> str:
    """The path or address of an image; empty where it has none."""
    try:
        plain = plain_value(value)
    except Rejected:
        return ""
    return plain if isinstance(plain, str) else ""


def _from_base64(text: str) -> memoryview:
    try:
        return memoryview(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise Rejected("image_undecodable", f"base64: {error}") from error
