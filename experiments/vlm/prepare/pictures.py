"""Bytes as they came to a picture as it goes into a shard: judged whole, shrunk and encoded anew where that was asked for."""

import hashlib
import io
from dataclasses import dataclass

from PIL import Image as PILImage

from experiments.vlm.data.image import decode, probe
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.records.record import Picture

# Formats that may stay as they are, with the names that readers of shards know them by. Others become PNG.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
ENCODED = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
SIDE_LIMITS = {"JPEG": 65500, "WEBP": 16383}  # pixels a side that can be encoded; longer images become PNG
BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF")  # of images, which Pillow may not open when cut (WebP)
CHECK_SHRINK = 32  # a check decodes every byte, but to as few pixels as the decoder can


@dataclass(frozen=True)
class Encoding:
    encode: str = "keep"
    max_side: int = 0
    quality: int = 92


def finish(data: bytes, encoding: Encoding) -> Picture:
    """Raises Rejected. Bytes that already are what was asked for stay the same bytes."""
    height, width = probe(data)
    with PILImage.open(io.BytesIO(data)) as image:
        came_as = str(image.format)
    target = shrunk(height, width, encoding.max_side)
    wanted = ENCODED.get(encoding.encode, came_as if came_as in EXTENSIONS else "PNG")
    if target == (height, width) and EXTENSIONS[wanted] == EXTENSIONS.get(came_as):
        check(data, height, width)
        out = data
    else:
        if wanted not in ENCODED.values() or max(target) > SIDE_LIMITS.get(wanted, max(target)):
            wanted = "PNG"
        out = encoded(data, target, wanted, encoding.quality)
    return Picture(out, EXTENSIONS[wanted], *target, hashlib.sha256(data).hexdigest())


def check(data: bytes, height: int, width: int) -> None:
    decode(data, max(1, height // CHECK_SHRINK), max(1, width // CHECK_SHRINK))


def looks_whole(data: bytes) -> bool:
    """False where an image begins well and does not end: its connection may have broken. What is no image is whole."""
    try:
        height, width = probe(data)
    except Rejected:
        return bool(data) and not data.startswith(BEGINNINGS)
    try:
        check(data, height, width)
    except Rejected:
        return False
    return True


def shrunk(height: int, width: int, max_side: int) -> tuple[int, int]:
    """Never enlarged, never less than a pixel."""
    scale = max_side / max(height, width) if max_side else 1.0
    if scale >= 1:
        return height, width
    return max(1, round(height * scale)), max(1, round(width * scale))


def encoded(data: bytes, size: tuple[int, int], wanted: str, quality: int) -> bytes:
    out = io.BytesIO()
    PILImage.fromarray(decode(data, *size)).save(out, wanted, **({} if wanted == "PNG" else {"quality": quality}))
    return out.getvalue()
