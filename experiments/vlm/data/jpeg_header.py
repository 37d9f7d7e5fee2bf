"""The size of a JPEG whose header holds nothing unusual, without opening it with Pillow, which takes three
times as long.

Pillow stays the judge: a size is given only where every segment is one that Pillow is known to accept, and
nothing in it (EXIF, XMP, several pictures, four colours) could turn the image or change how it is read. All
others give None.
"""

from PIL import Image as PILImage

TABLES = frozenset((0xC4, 0xDD, 0xFE))  # Huffman tables, restart interval, comment: Pillow passes over them
FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive
# how they begin, least bytes
KNOWN = {0xE0: (b"JFIF\0", 14), 0xE2: (b"ICC_PROFILE\0", 14), 0xEE: (b"Adobe", 12)}
START_OF_SCAN, QUANTIZATION, TABLE_BYTES = 0xDA, 0xDB, 65


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a grey or three-coloured JPEG that is not to be turned; None: ask Pillow."""
    if data[:2] != b"\xff\xd8":
        return None
    place, last, size = 2, len(data) - 4, None
    while place <= last and data[place] == 0xFF:
        marker = data[place + 1]
        body, place = place + 4, place + 2 + (data[place + 2] << 8 | data[place + 3])
        if place > len(data) or place < body:
            return None
        if marker == START_OF_SCAN:
            return size
        if marker in FRAMES:
            if size is not None or (size := _frame_size(data, body, place - body)) is None:
                return None
        elif marker == QUANTIZATION:
            if (place - body) % TABLE_BYTES or any(
                data[table] > 3 for table in range(body, place, TABLE_BYTES)
            ):
                return None
        elif marker in KNOWN:
            start, least = KNOWN[marker]
            if place - body < least or not data.startswith(start, body):
                return None
        elif marker not in TABLES:
            return None
    return None


def _frame_size(data: bytes, body: int, length: int) -> tuple[int, int] | None:
    if length < 6:
        return None
    bits, colours = data[body], data[body + 5]
    height, width = data[body + 1] << 8 | data[body + 2], data[body + 3] << 8 | data[body + 4]
    pixels, most = height * width, PILImage.MAX_IMAGE_PIXELS
    is_usual = bits == 8 and colours in (1, 3) and length == 6 + 3 * colours
    is_allowed = pixels > 0 and (most is None or pixels <= most)
    return (height, width) if is_usual and is_allowed else None
