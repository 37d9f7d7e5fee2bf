"""What records hold in place of an image. Imports no torch.

b"..."                                  the bytes (in JSON: base64)
{"bytes": b"...", "path": "..."}        bytes, or where they are None the path (Hugging Face's Image feature)
{"url": "..."}                          an address
"images/1.jpg"                          a path below the record file's folder
"https://..." or "data:image/..."       an address, or the bytes themselves

An item of a message holds one of these under a name of HELD_UNDER.
"""

import base64
import binascii
from typing import Any

from experiments.vlm.data.rejects import Rejected

IMAGE_ITEMS = ("image", "image_url")  # types of items
HELD_UNDER = ("image", "image_url", "url", "path", "bytes", "base64")


def held_image(item: dict[str, Any]) -> Any:
    """What an image item says of its image; nothing where it only marks the place of one."""
    own = {name: item[name] for name in HELD_UNDER if item.get(name) is not None}
    return next((own[name] for name in ("image", "image_url") if name in own), own)


def is_address(value: str) -> bool:
    return "://" in value[:12]


def plain_value(value: Any) -> memoryview | str:
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
