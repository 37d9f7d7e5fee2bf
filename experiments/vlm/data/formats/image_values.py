"""What a record may hold in place of an image.

b"..."                                  the bytes (in JSON: base64)
{"bytes": b"...", "path": "..."}        bytes, or where they are None the path (Hugging Face's Image feature)
{"url": "...", "path": "..."}           an address; a path next to it says where the image once was
"images/1.jpg"                          a path below the record file's folder
"https://..." or "data:image/..."       an address, or the bytes themselves

An item of a message holds one of these under a name of HELD_UNDER. A record of a tar holds the members
themselves, and names them by their extension or their name (tar_shard.py).
"""

import base64
import binascii
from typing import Any

from experiments.vlm.data.rejects import Rejected

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
IMAGE_ITEMS = ("image", "image_url")  # types of items
HELD_UNDER = ("image", "image_url", "url", "path", "bytes", "base64")


def split_name(name: str) -> tuple[str, str]:
    """Before and after the last dot of a field's name or an extension: ("0", "jpg"), ("", "txt")."""
    part, _, kind = name.rpartition(".")
    return part, kind


def is_image_name(name: str) -> bool:
    """Whether a field is called like an image file."""
    return name.rpartition(".")[2] in IMAGE_EXTENSIONS


def held_image(item: dict[str, Any]) -> Any:
    """What an image item says of its image; nothing where it only marks the place of one."""
    own = {name: item[name] for name in HELD_UNDER if item.get(name) is not None}
    return next((own[name] for name in ("image", "image_url") if name in own), own)


def is_address(value: str) -> bool:
    """Whether a plain value is an address; else it is a path.

    Which addresses are fetched, the client says.
    """
    return "://" in value[:12]


def plain_value(value: Any) -> memoryview | str:
    """Bytes, or a path or address, out of whatever the record holds. Raises Rejected."""
    if isinstance(value, dict):
        name = next((name for name in ("bytes", "url", "path", "base64") if value.get(name) is not None), "")
        value = value.get(name)
        if name in ("bytes", "base64") and isinstance(value, str):
            return _from_base64(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return memoryview(value)
    if isinstance(value, str) and value.startswith("data:"):
        return _from_base64(value.partition(",")[2])
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
