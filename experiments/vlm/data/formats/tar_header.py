"""What a tar says of its members: the header of each, as ustar, GNU tar, pax and older tars have it.

    header   512 bytes: name, kind, size, and a checksum by which garbage is never taken for one
    data     as many bytes as the header says, padded to whole blocks of 512
    "x", "L" extension headers: the data are the name or size of the next header, where that has no room

A tar ends with two blocks of zeros and more, up to a whole record (`tar --blocking-factor`).
"""

import re
import zlib
from collections.abc import Callable
from typing import NamedTuple

from experiments.vlm.data.rejects import Rejected

BLOCK = 512
MOST_EXTENSION = 1 << 20  # bytes of an extension header: a longer one is garbage that looks like one
REGULAR = (b"0", b"\0", b"7")
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders
NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]*)$", re.DOTALL)


class Member(NamedTuple):
    """A file of a sample inside a tar."""

    key: str
    extension: str  # all after the first dot, in lower case
    name: str  # as in the tar
    offset: int  # of its bytes
    size: int

    @property
    def kind(self) -> str:
        """What is after the last dot: "png" of a.seg.png."""
        return self.extension.rpartition(".")[2]


class Header(NamedTuple):
    """What a tar says of one entry."""

    name: str
    kind: bytes
    offset: int  # of the data
    size: int
    end: int  # where the next header begins

    def member(self) -> Member | None:
        """None where it is no part of a sample: a folder, a link, a hidden file, a name without a dot."""
        name = self.name.removeprefix("./")
        match = NAME.match(name) if self.kind in REGULAR else None
        return Member(match[1], match[2].lower(), name, self.offset, self.size) if match else None


class Headers:
    """The headers of a tar by position. `read(offset, size)` gives bytes of it, or raises Rejected.

    `checksum`: CRC-32 of all that was read, so of the names and sizes of the members, in their order.
    """

    def __init__(self, read: Callable[[int, int], bytes]):
        self._bytes = read
        self.checksum = 0

    def at(self, start: int) -> Header | None:
        """The header at `start`, extensions included; None for zeros. Raises Rejected for neither."""
        name, size = "", -1
        while True:
            block = self._read(start, BLOCK)
            if not block.strip(b"\0"):
                return None
            kind, length = block[156:157], _checked_size(block, start)
            if kind in (b"x", b"X", b"L"):
                body = self._read(start + BLOCK, _extension(length, start))
                found, size = _pax(body) if kind != b"L" else (_text(body), size)
                name = found or name
            elif kind not in (b"g", b"K"):
                length = length if size < 0 else size
                data = 0 if kind in WITHOUT_DATA else length
                return Header(name or _name(block), kind, start + BLOCK, data, start + BLOCK + _padded(data))
            start += BLOCK + _padded(length)

    def _read(self, start: int, size: int) -> bytes:
        data = self._bytes(start, size)
        self.checksum = zlib.crc32(data, self.checksum)
        return data


def is_header(block: bytes) -> bool:
    """Whether these 512 bytes have the checksum of a header; old tars added up signed bytes."""
    field = block[148:156].strip(b" \0")
    if not field or field.strip(b"01234567"):
        return False
    over = sum(block) - sum(block[148:156]) + 8 * ord(" ") - int(field, 8)
    return over == 0 or over == 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _checked_size(block: bytes, start: int) -> int:
    """The size field. Raises Rejected where this is no header."""
    try:
        if is_header(block):
            return _number(block[124:136])
    except ValueError:
        pass
    raise Rejected("shard_damaged", f"no tar header at byte {start}")


def _extension(length: int, start: int) -> int:
    if length > MOST_EXTENSION:
        raise Rejected("shard_damaged", f"the extension header at byte {start} says it has {length} bytes")
    return length


def _number(field: bytes) -> int:
    """Octal digits, or where the first bit is set (8 GiB and more) binary."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _pax(body: bytes) -> tuple[str, int]:
    """Path and size of an extended header, "" and -1 where it has none: records "LENGTH KEY=VALUE\\n"."""
    name, size = "", -1
    while body:
        length, _, rest = body.partition(b" ")
        if not length.isdigit() or len(length) > 8 or int(length) <= len(length):
            break
        key, _, value = body[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size" and value.isdigit() and len(value) < 20:
            size = int(value)
        body = body[int(length) :]
    return name, size


def _name(block: bytes) -> str:
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(block[:100])}" if prefix else _text(block[:100])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
