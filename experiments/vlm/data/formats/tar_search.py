"""One pass over the headers of a tar: where its samples lie, and what of it is damaged.

A damaged tar loses only what is damaged. Where a header should be and none is, the search goes on at the next
512 bytes that are one, wherever they lie:

    a byte of a header, junk      members go on at the next header; what is in between is counted
    bytes that are missing        a member reaches over the next header: it is left out, that one is found
    zeros, where no tar ends      a hole: what stood there is counted as lost
    `cat a.tar b.tar`             both are read, also where the first is cut off

So a sample is missing only where a header or the data of one of its members is. In joined tars with damage,
samples of the same key stay apart, or the text of one would get the image of the other.
"""

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from experiments.vlm.data.formats.json_index import SCAN_BYTES, read_at
from experiments.vlm.data.formats.tar_header import BLOCK, Header, Headers, Member, is_header
from experiments.vlm.data.rejects import Rejected

READ_BYTES = 1 << 20  # at a time while headers are searched: on a cold network file system each read waits
END = 2 * BLOCK  # of zeros, at least
RECORD = 20 * BLOCK  # what most writers fill up with zeros
CHECKSUM = slice(148, 156)  # of a header
MAGIC = 257  # where a header since 1988 says "ustar"
OCTAL = np.frombuffer(b"01234567 \0", np.uint8)
EXAMPLES = 3  # of what is damaged, in a message


class Samples(NamedTuple):
    """Where the samples of a tar lie: sample i is the members at `headers[starts[i] : starts[i + 1]]`."""

    headers: np.ndarray  # int64 [members]
    starts: np.ndarray  # int64 [samples + 1]
    checksum: int  # of the headers
    damage: Rejected | None  # what is wrong with the tar, if anything is


class Place(NamedTuple):
    """A member where it was found."""

    start: int  # of its first header
    part: int  # of joined tars, where one is damaged
    member: Member


def find_samples(file: int) -> Samples:
    """Reads through the headers of an opened tar. Raises OSError."""
    search = _Search(file)
    runs = list(_runs(search.members()))
    damage = search.damage()
    together = _usual(runs) if damage else set[str]()
    samples, headers = array("q"), array("q")
    latest: dict[tuple[int, str], tuple[int, set[str]]] = {}  # its newest sample, and the extensions there
    count = 0
    for run in runs:
        key = run[0].part, run[0].member.key
        extensions = {place.member.extension for place in run}
        number, seen = latest.get(key, (-1, extensions))
        if not seen.isdisjoint(extensions) or seen | extensions <= together:
            number, seen = count, set()
            count += 1
        latest[key] = number, seen | extensions
        samples.extend([number] * len(run))
        headers.extend(place.start for place in run)
    order = np.argsort(samples, kind="stable")
    starts = np.searchsorted(np.array(samples, np.int64)[order], np.arange(count + 1))
    return Samples(np.array(headers, np.int64)[order], starts, search.checksum, damage)


def _usual(runs: list[list[Place]]) -> set[str]:
    """Extensions that stand together in this tar: what has them apart is what is left of two samples."""
    sets = Counter(frozenset(place.member.extension for place in run) for run in runs)
    return set(sets.most_common(1)[0][0]) if sets else set()


def _runs(places: Iterator[Place]) -> Iterator[list[Place]]:
    """Neighbours of one key, each extension once: they stay together whatever else has that key."""
    run: list[Place] = []
    key, seen = "", set[str]()
    for place in places:
        _, part, member = place
        if member.key != key or member.extension in seen or part != run[-1].part:
            if run:
                yield run
            run, key, seen = [], member.key, set()
        run.append(place)
        seen.add(member.extension)
    if run:
        yield run


class _Entry(NamedTuple):
    """What a header announces. Held back until the next one shows that it does not reach over that."""

    start: int
    part: int
    header: Header


def _places(entry: _Entry | None) -> Iterable[Place]:
    member = entry.header.member() if entry else None
    return (Place(entry.start, entry.part, member),) if entry and member else ()


class _Search:
    """One pass. `checksum` and `damage` are known after the last member."""

    def __init__(self, file: int):
        self._file = file
        self._size = os.fstat(file).st_size
        self._headers = Headers(Blocks(file).read)
        self._begin, self._part = 0, 0  # of the present one of joined tars: its first byte, its number
        self._damaged: list[str] = []
        self._only_end = True  # nothing is wrong but that it ends early
        self._skipped = 0  # bytes

    @property
    def checksum(self) -> int:
        return self._headers.checksum

    def damage(self) -> Rejected | None:
        if not self._damaged:
            return None
        more = len(self._damaged) - EXAMPLES
        named = "; ".join(self._damaged[:EXAMPLES]) + (f"; and {more} places more" if more > 0 else "")
        skipped = f"; {self._skipped:,} bytes are skipped" if self._skipped else ""
        return Rejected("shard_truncated" if self._only_end else "shard_damaged", named + skipped)

    def members(self) -> Iterator[Place]:
        """All that are whole, in the order of the file."""
        start, entry, closed = 0, None, self._size == 0
        while start < self._size:
            header = self._at(start)
            if isinstance(header, Header):
                yield from _places(entry)
                entry, closed = _Entry(start, self._part, header), False
                start = header.end
                if header.offset + header.size > self._size:
                    entry, start = None, self._cut_off(header)
                continue
            closed = True
            inside = self._inside(entry)
            if entry and inside:
                if inside < entry.header.offset + entry.header.size:
                    self._note_damage(f"{entry.header.name} reaches over the header at byte {inside}", 0)
                    entry = None
                else:
                    self._note_damage(f"zeros are missing before byte {inside}", 0)
                start = inside
            elif header is None:
                start = self._after_zeros(start)
            else:
                start = self._after_garbage(start, header)
        yield from _places(entry)
        if not closed or not self._size:
            self._note_damage(f"it ends at byte {self._size}, without the zeros of a tar's end", 0, end=True)

    def _note_damage(self, what: str, skipped: int, end: bool = False) -> None:
        self._damaged.append(what)
        self._skipped += skipped
        self._only_end &= end

    def _at(self, start: int) -> Header | Rejected | None:
        try:
            return self._headers.at(start)
        except Rejected as rejected:
            return rejected

    def _cut_off(self, header: Header) -> int:
        """Where it goes on after a member that is longer than the file: in a tar that was joined to it."""
        found = self._next(header.offset, self._size)
        skipped = found - header.offset if found < self._size else 0
        self._note_damage(f"{header.name} is cut off at byte {found}", skipped, end=found == self._size)
        return found

    def _inside(self, entry: _Entry | None) -> int:
        """Where another header begins before an entry ends, as where bytes are missing; 0 if none does.

        Not so in a tar in the tar, whose data begin with a header.
        """
        if entry is None or isinstance(self._at(entry.header.offset), Header):
            return 0
        found = self._next(entry.header.offset, entry.header.end)
        return found if found < entry.header.end else 0

    def _after_garbage(self, start: int, wrong: Rejected) -> int:
        found = self._next(start, self._size)
        cut = wrong.reason == "shard_truncated" and found == self._size
        self._note_damage(wrong.detail, found - start, end=cut)
        return found

    def _after_zeros(self, start: int) -> int:
        """Where another tar begins, or this one goes on; the end of the file if neither does."""
        stop = self._end_of_zeros(start)
        count, full = stop - start, (stop - self._begin) % RECORD == 0
        is_end = count == END or full and END < count < RECORD + END
        if stop == self._size:
            if not is_end and not self._damaged or count >= RECORD + END:  # damage moves what follows
                self._note_damage(f"nothing but zeros from byte {start} to {stop}", 0, end=True)
        elif isinstance(self._at(stop), Header) and is_end:
            self._begin, self._part = stop, self._part + bool(self._damaged)
        else:
            found = self._next(stop, self._size)
            if found == self._size:  # a note, or whatever else, behind the end of the tar
                return self._after_garbage(stop, Rejected("shard_damaged", f"no tar header at byte {stop}"))
            self._note_damage(f"zeros from byte {start} to {stop}, where no tar ends", found - start)
            return found
        return stop

    def _end_of_zeros(self, start: int) -> int:
        """Where the first block begins that holds more than zeros."""
        while start < self._size:
            block = os.pread(self._file, SCAN_BYTES, start)
            if (place := len(block) - len(block.lstrip(b"\0"))) < len(block):
                return start + place // BLOCK * BLOCK
            start += len(block)
        return self._size

    def _next(self, start: int, end: int) -> int:
        """Where in [start, end) the first header begins that can be read; `end` if none does."""
        for offset in range(start, end, SCAN_BYTES):
            block = os.pread(self._file, min(SCAN_BYTES, end - offset) + BLOCK, offset)
            for place in _candidates(block):
                if offset + place < end and isinstance(self._at(offset + place), Header):
                    return offset + place
        return end


def _candidates(block: bytes) -> list[int]:
    """Where headers may begin: around each "ustar", and where a block of 512 has digits for a checksum."""
    count = len(block) // BLOCK
    fields = np.frombuffer(block, np.uint8, count * BLOCK).reshape(count, BLOCK)[:, CHECKSUM]
    digits = np.isin(fields, OCTAL).all(axis=1) & (fields >= ord("0")).any(axis=1)
    places = {int(number) * BLOCK for number in np.flatnonzero(digits)}
    places |= {found.start() - MAGIC for found in re.finditer(b"ustar", block)}
    return sorted(place for place in places if place >= 0 and is_header(block[place : place + BLOCK]))


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
