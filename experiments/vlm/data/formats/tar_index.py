"""Where the members of a tar lie, found once from the headers alone, in samples as WebDataset has them.

    a/0001.jpg, a/0001.txt, a/0001.seg.png    one sample of key "a/0001" with members "jpg", "txt", "seg.png"

A key is the path up to the first dot of the file's name. Members of a sample need not be neighbours; a name
that comes a second time begins a new sample. What is kept is 8 bytes a member: names and sizes are read again
from the headers. Python's tarfile takes ten times as long, and a loader opens a shard for each of its slots;
webdataset reads in sequence, where a sample that waits for its slot must be read again by its number.
"""

import os
import re
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.vlm.data.formats.json_index import SCAN_BYTES, read_at
from experiments.vlm.data.rejects import Rejected

BLOCK = 512
MOST_ZEROS = 1 << 20  # that a tar ends with; more are what a download left empty
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

    @property
    def part(self) -> str:
        """What is between: "seg" of a.seg.png, "" of a.png."""
        return self.extension.rpartition(".")[0]


class Header(NamedTuple):
    """What a tar says of one entry."""

    name: str
    kind: bytes
    offset: int  # of the data
    size: int
    end: int  # where the next header begins

    def member(self) -> Member | None:
        """None where it is no part of a sample: a folder, a link, a hidden file, a name without a dot."""
        match = NAME.match(self.name.removeprefix("./")) if self.kind in REGULAR else None
        return (
            Member(match[1], match[2].lower(), self.name.removeprefix("./"), self.offset, self.size)
            if match
            else None
        )


class TarIndex:
    """Samples of an opened tar by number. `tail`: why it ends early, if it does."""

    def __init__(self, file: int):
        self._file = file
        self._size = os.fstat(file).st_size
        self.tail = None if self._size else Rejected("shard_truncated", "the file is empty")
        samples, headers = array("q"), array("q")
        # key -> its newest sample, and the extensions seen there
        latest: dict[str, tuple[int, set[str]]] = {}
        count = 0
        for start, member in self._members():
            number, seen = latest.get(member.key, (-1, set()))
            if number < 0 or member.extension in seen:
                number, seen = latest[member.key] = count, set()
                count += 1
            seen.add(member.extension)
            samples.append(number)
            headers.append(start)
        order = np.argsort(samples, kind="stable")
        self._headers = np.array(headers, np.int64)[order]
        self._starts = np.searchsorted(np.array(samples, np.int64)[order], np.arange(count + 1))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def sample(self, index: int) -> list[Member]:
        """The members in the order of the tar. Raises Rejected where the file has changed."""
        first, end = self._starts[index : index + 2]
        return [self._member(int(start)) for start in self._headers[first:end]]

    def key(self, index: int) -> str:
        """What the members of a sample have in common. Raises Rejected where the file has changed."""
        return self._member(int(self._headers[self._starts[index]])).key

    def _member(self, start: int) -> Member:
        header = self._header(start)
        member = header.member() if header else None
        if member is None:
            raise Rejected("shard_unreadable", f"it has changed at byte {start} since it was opened")
        return member

    def _members(self) -> Iterator[tuple[int, Member]]:
        """(position of the first header, member) of each; stops at the end, however it looks."""
        start = 0
        try:
            while start < self._size:
                header = self._header(start)
                if header is None:
                    start = self._appended(start)
                    continue
                if header.offset + header.size > self._size:
                    raise Rejected("shard_truncated", f"{header.name} is cut off at byte {self._size}")
                if member := header.member():
                    yield start, member
                start = header.end
        except Rejected as rejected:
            self.tail = Rejected("shard_truncated", rejected.detail)

    def _appended(self, start: int) -> int:
        """Where after its zeros another tar begins (`cat a.tar b.tar`); the end of the file if none does."""
        first = start
        while block := os.pread(self._file, SCAN_BYTES, start):
            if (place := len(block) - len(block.lstrip(b"\0"))) < len(block):
                start += place // BLOCK * BLOCK
                break
            start += len(block)
        if start - first > MOST_ZEROS:
            self.tail = Rejected("shard_truncated", f"nothing but zeros from byte {first} to {start}")
        try:
            return start if start < self._size and self._header(start) else self._size
        except Rejected:
            return self._size  # something else, which is none of ours

    def _header(self, start: int) -> Header | None:
        """The header at `start`, with what extension headers before it say; None for the zeros at the end."""
        name, size = "", -1
        while True:
            block = read_at(self._file, start, BLOCK)
            if not block.strip(b"\0"):
                return None
            kind, length = block[156:157], _checked_size(block, start)
            if kind in (b"x", b"X", b"L"):
                body = read_at(self._file, start + BLOCK, length)
                found, size = _pax(body) if kind != b"L" else (_text(body), size)
                name = found or name
            elif kind not in (b"g", b"K"):
                length = length if size < 0 else size
                data = 0 if kind in WITHOUT_DATA else length
                return Header(name or _name(block), kind, start + BLOCK, data, start + BLOCK + _padded(data))
            start += BLOCK + _padded(length)


def _checked_size(block: bytes, start: int) -> int:
    """The size field. Raises Rejected where the checksum is wrong: garbage is never taken for a header."""
    try:
        if int(block[148:156].strip(b" \0"), 8) == sum(block) - sum(block[148:156]) + 8 * ord(" "):
            return _number(block[124:136])
    except ValueError:
        pass
    raise Rejected("shard_truncated", f"no tar header at byte {start}")


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
        if not length.isdigit() or int(length) <= len(length):
            break
        key, _, value = body[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size" and value.isdigit():
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
