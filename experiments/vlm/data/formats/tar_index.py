"""Where the members of a tar lie, found once from the headers alone, in samples as WebDataset has them.

    a/0001.jpg, a/0001.txt, a/0001.seg.png    one sample of key "a/0001" with members "jpg", "txt", "seg.png"

A key is the path up to the first dot of the file's name. Members of a sample need not be neighbours; a name
that comes a second time begins a new sample. What is kept is 8 bytes a member, in the cache folder too, so
that a tar is searched once for all slots, runs and epochs: names and sizes are read again from the headers.
Python's tarfile takes ten times as long, and a loader opens a shard for each of its slots; webdataset reads
in sequence, where a sample that waits for its slot must be read again by its number.
"""

import json
import os
import re
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.vlm.data.formats.json_index import SCAN_BYTES, read_at
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.file_cache import FileCache, origin_of

VERSION = "samples 1"  # of what is kept: another number where the same tar would give other samples
BLOCK = 512
READ_BYTES = 1 << 20  # at a time while headers are searched: on a cold network file system each read waits
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


class Found(NamedTuple):
    """Where the samples of a tar lie: sample i is the members at `headers[starts[i] : starts[i + 1]]`."""

    headers: np.ndarray  # int64 [members]
    starts: np.ndarray  # int64 [samples + 1]
    tail: Rejected | None  # why the tar ends early, if it does

    def to_bytes(self) -> bytes:
        tail = [self.tail.reason, self.tail.detail] if self.tail else None
        head = json.dumps({"members": len(self.headers), "tail": tail})
        return head.encode() + b"\n" + np.concatenate([self.headers, self.starts]).astype("<i8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Found":
        head, _, places = data.partition(b"\n")
        told, numbers = json.loads(head), np.frombuffer(places, "<i8").astype(np.int64)
        tail = Rejected(*told["tail"]) if told["tail"] else None
        return cls(numbers[: told["members"]], numbers[told["members"] :], tail)


class TarIndex:
    """Samples of an opened tar by number. `tail`: why it ends early, if it does."""

    def __init__(self, file: int, found: Found | None = None):
        """`found`: what was found in it before."""
        self._headers = Headers(partial(read_at, file))
        self.found = found or find_samples(file)
        self.tail = self.found.tail

    def __len__(self) -> int:
        return len(self.found.starts) - 1

    def sample(self, index: int) -> list[Member]:
        """The members in the order of the tar. Raises Rejected where the file has changed."""
        first, end = self.found.starts[index : index + 2]
        return [self._member(int(start)) for start in self.found.headers[first:end]]

    def key(self, index: int) -> str:
        """What the members of a sample have in common. Raises Rejected where the file has changed."""
        return self._member(int(self.found.headers[self.found.starts[index]])).key

    def _member(self, start: int) -> Member:
        header = self._headers.at(start)
        member = header.member() if header else None
        if member is None:
            raise Rejected("shard_unreadable", f"it has changed at byte {start} since it was opened")
        return member


def open_index(file: int, path: str, cache: FileCache) -> TarIndex:
    """The index of the tar at `path`, which is open as `file`: kept in the cache, 8 bytes a member."""
    if os.fstat(file).st_size <= READ_BYTES:
        return TarIndex(file)  # one read finds all of it
    found: list[Found] = []

    def keep(copy: Path) -> None:
        found.append(find_samples(file))
        copy.write_bytes(found[0].to_bytes())

    try:
        kept = cache.get(f"{origin_of(path)} {VERSION}", keep, ".index").read_bytes()
        return TarIndex(file, found[0] if found else Found.from_bytes(kept))
    except (OSError, ValueError):  # of the cache; what is wrong with the tar itself comes again
        return TarIndex(file, found[0] if found else None)


def find_samples(file: int) -> Found:
    """Reads through the headers of an opened tar. Raises OSError."""
    search = _Search(file)
    samples, headers = array("q"), array("q")
    # key -> its newest sample, and the extensions seen there
    latest: dict[str, tuple[int, set[str]]] = {}
    count = 0
    for start, member in search.members():
        number, seen = latest.get(member.key, (-1, set()))
        if number < 0 or member.extension in seen:
            number, seen = latest[member.key] = count, set()
            count += 1
        seen.add(member.extension)
        samples.append(number)
        headers.append(start)
    order = np.argsort(samples, kind="stable")
    starts = np.searchsorted(np.array(samples, np.int64)[order], np.arange(count + 1))
    return Found(np.array(headers, np.int64)[order], starts, search.tail)


class _Search:
    """One pass over the headers of a tar. `tail`: why it ended early."""

    def __init__(self, file: int):
        self._file = file
        self._size = os.fstat(file).st_size
        self._headers = Headers(Blocks(file).read)
        self.tail = None if self._size else Rejected("shard_truncated", "the file is empty")

    def members(self) -> Iterator[tuple[int, Member]]:
        """(position of the first header, member) of each; stops at the end, however it looks."""
        start = 0
        try:
            while start < self._size:
                header = self._headers.at(start)
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
            return start if start < self._size and self._headers.at(start) else self._size
        except Rejected:
            return self._size  # something else, which is none of ours


class Blocks:
    """A file that is read forward in blocks of a megabyte, however small the pieces that are asked for."""

    def __init__(self, file: int):
        self._file, self._start, self._block = file, 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """As read_at."""
        if not self._start <= offset <= offset + size <= self._start + len(self._block):
            self._start, self._block = offset, os.pread(self._file, max(size, READ_BYTES), offset)
        at = offset - self._start
        piece = self._block[at : at + size]
        return piece if len(piece) == size else read_at(self._file, offset, size)


class Headers:
    """The headers of a tar by position. `read(offset, size)` gives bytes of it, or raises Rejected."""

    def __init__(self, read: Callable[[int, int], bytes]):
        self._read = read

    def at(self, start: int) -> Header | None:
        """The header at `start`, with what extension headers before it say; None for the zeros at the end."""
        name, size = "", -1
        while True:
            block = self._read(start, BLOCK)
            if not block.strip(b"\0"):
                return None
            kind, length = block[156:157], _checked_size(block, start)
            if kind in (b"x", b"X", b"L"):
                body = self._read(start + BLOCK, length)
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
