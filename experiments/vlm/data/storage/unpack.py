"""A packed file (.gz, .tgz, .bz2, .zst, .zip) to one that can seek; as much as possible of a damaged one.

Where a stream cannot be unpacked any further, all bytes before that are kept, and it goes on where the next
stream begins, if the file is several that were joined (`cat a.gz b.gz`). A .zip must hold one file. What is
wrong is noted next to the copy, since the copy itself may look whole: `damage_of`.
"""

import bz2
import gzip
import io
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from experiments.vlm.data.storage.file_cache import FileCache, origin_of
from experiments.vlm.data.storage.remote import is_http

STEP_BYTES = 1 << 14  # of what is unpacked, at a time
NEAR_BYTES = 1 << 18  # to a damage; pyarrow reads 64 KB at a time
TRICKLE_BYTES = 64  # at a time, so near
SEARCH_BYTES = 1 << 20
NOTES_BYTES = 16 << 20
ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile, pa.ArrowException)


class Packing(NamedTuple):
    """A way of packing."""

    open: Callable[[str], Any]
    codec: str  # pyarrow's name of it; empty: it has none, so nothing is had behind a damage
    magic: bytes  # with which a stream begins


def _open_zstd(path: str) -> io.BufferedReader:
    return io.BufferedReader(pa.CompressedInputStream(path, "zstd"), STEP_BYTES)


def _open_zip(path: str) -> IO[bytes]:
    try:
        packed = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise OSError(str(error)) from error
    files = [name for name in packed.namelist() if not name.endswith("/")]
    if len(files) != 1:
        raise OSError(f"it holds {len(files):,} files, not one: unpack it")
    return packed.open(files[0])


_GZIP = Packing(gzip.open, "gzip", b"\x1f\x8b\x08")
PACKINGS = {
    ".gz": _GZIP,
    ".tgz": _GZIP,
    ".bz2": Packing(bz2.open, "bz2", b"BZh"),
    ".zst": Packing(_open_zstd, "zstd", b"\x28\xb5\x2f\xfd"),
    ".zip": Packing(_open_zip, "", b"PK\x03\x04"),
}


def is_packed(path: str) -> bool:
    """By its name."""
    return plain_name(path).suffix in PACKINGS


def plain_name(path: str) -> Path:
    """In lower case; of an address without its query."""
    return Path((path.partition("?")[0] if is_http(path) else path).lower())


def packing_of(path: str) -> Packing | None:
    """How a local file is packed, as its first bytes say, whatever its name is. Raises OSError."""
    with open(path, "rb") as file:
        head = file.read(4)
    return next((packing for packing in PACKINGS.values() if head.startswith(packing.magic)), None)


def unpack(path: str, target: io.BufferedRandom, suffix: str) -> str:
    """What is wrong with it; empty where nothing is. Raises OSError and others where nothing can be had.

    target: an empty file to write. suffix: of its name. What it holds decides, since a client may have
    unpacked it on the way.
    """
    if not os.path.getsize(path):
        raise OSError("it has no bytes")
    packing = packing_of(path) or (None if _is_plain(path) else PACKINGS[suffix])
    if packing is None:
        with open(path, "rb") as plain:
            shutil.copyfileobj(plain, target)
        return ""
    with packing.open(path) as source:
        try:
            while block := source.read1(STEP_BYTES):
                target.write(block)
            return ""
        except ERRORS as error:
            why = _damage(error)
        if not packing.codec:
            if not target.tell():
                raise OSError(why)
            return f"it cannot be unpacked to its end: {why}"
    with open(path, "rb") as file:
        where = _rescue(file, packing, target)
    if not target.tell():
        raise OSError(why)
    return f"it cannot be unpacked at byte {where}: {why}"


def _is_plain(path: str) -> bool:
    """Whether a file looks like one that is not packed: a tar, a table, or text."""
    with open(path, "rb") as file:
        head = file.read(512)
    return (
        head[257:262] == b"ustar"
        or head.startswith((b"PAR1", b"ARROW1"))
        or head.lstrip()[:1] in (b"{", b"[")
    )


def note_damage(path: str, what: str, cache: FileCache) -> None:
    """Keep what `unpack` said of a file."""
    _notes(cache).note(origin_of(path), what)


def damage_of(path: str, cache: FileCache) -> str:
    """What was noted of a packed file; empty where nothing was."""
    return _notes(cache).noted(origin_of(path))


def _notes(cache: FileCache) -> FileCache:
    return FileCache(cache.folder / "damaged", NOTES_BYTES)


class _Trickle(io.RawIOBase):
    """A file from one byte on, and from another on in small pieces, however large pieces are asked for."""

    def __init__(self, file: io.BufferedReader, start: int, trickle: float):
        self.file, self.trickle = file, trickle
        file.seek(start)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size if self.file.tell() < self.trickle else min(size, TRICKLE_BYTES))


def _rescue(file: io.BufferedReader, packing: Packing, target: io.BufferedRandom) -> int:
    """Write what can be had of a damaged file after what `target` holds; the byte of the first damage."""
    target.seek(0, io.SEEK_END)
    first, start, done = -1, 0, target.tell()
    while start >= 0:
        for block in _unpacked(file, packing, start, done):
            target.write(block)
        end = file.tell()
        first = end if first < 0 else first
        # From its beginning: a stream that is cut off may be unpacked far into the next one before it fails.
        start, done = _next_stream(file, packing, start + 1, end), 0
    return first


def _next_stream(file: io.BufferedReader, packing: Packing, start: int, end: int) -> int:
    """Where from `start` on a stream begins that is no part of what failed at `end`; -1 if none does."""
    while (start := _find(file, packing.magic, start)) >= 0:
        source = pa.PythonFile(_Trickle(file, start, math.inf), mode="r")
        try:
            with pa.CompressedInputStream(source, packing.codec) as stream:
                while (block := stream.read(STEP_BYTES)) and file.tell() < end + NEAR_BYTES:
                    pass
                if block or file.tell() > end:
                    return start
        except ERRORS as error:
            _damage(error)
        start += 1
    return -1


def _unpacked(file: io.BufferedReader, packing: Packing, start: int, done: int) -> Iterator[bytes]:
    """The streams from byte `start` on, without the first `done` bytes of them, to the last that can be had.

    Twice: what is unpacked of the piece that meets the damage is lost, so the second time it is a small one.
    """
    trickle = math.inf
    for step in (STEP_BYTES, 1):
        source = pa.PythonFile(_Trickle(file, start, trickle), mode="r")
        try:
            with pa.CompressedInputStream(source, packing.codec) as stream:
                left = done
                while left and (block := stream.read(min(left, STEP_BYTES))):
                    left -= len(block)
                while block := stream.read(step):
                    done += len(block)
                    yield block
                return
        except ERRORS as error:
            _damage(error)
        trickle = file.tell() - NEAR_BYTES


def _damage(error: Exception) -> str:
    """What it says of the file. Raises it where it is the storage's: that has a number."""
    if isinstance(error, OSError) and error.errno:
        raise error
    return f"{type(error).__name__}: {error}"


def _find(file: io.BufferedReader, magic: bytes, start: int) -> int:
    """Where from `start` on a stream may begin; -1 if none does."""
    file.seek(start)
    while block := file.read(SEARCH_BYTES):
        if (place := block.find(magic)) >= 0:
            return start + place
        start += max(1, len(block) - len(magic) + 1) if len(block) == SEARCH_BYTES else len(block)
        file.seek(start)
    return -1
