"""Pieces of an open file by position: lines, and the items of a JSON list. Found once, read again with pread.

Memory: 16 bytes a piece; for files above SCAN_BYTES in the cache folder, mapped by all processes.
"""

import json
import os
import weakref
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.file_cache import FileCache, origin_of

SCAN_BYTES = 1 << 22
VERSION = "pieces 2"  # of what is kept: another number where the same file would give other pieces
SHORT = 16  # bytes: only a shorter line is looked into, since a longer blank one would be no JSON anyway
IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


class Spans:
    """Pieces of a file, each from a start to an end. `tail`: why they end early, if they do."""

    def __init__(self, file: int, edges: np.ndarray, tail: Rejected | None = None):
        """edges: int64 [pieces, 2]."""
        self._file, self._edges, self.tail = file, edges, tail

    def __len__(self) -> int:
        return len(self._edges)

    def checksum(self) -> int:
        """CRC-32 of where every 64th piece lies: records in another order, or of other lengths, move some."""
        return zlib.crc32(self._edges[::64].tobytes())

    def read(self, index: int) -> bytes:
        """The bytes of one piece. Raises Rejected where the file is shorter than it was."""
        start, end = (int(edge) for edge in self._edges[index])
        return read_at(self._file, start, end - start)

    def save(self, path: Path) -> None:
        """Write them so that `load` maps them: how many, their edges, then the tail as JSON."""
        tail = [self.tail.reason, self.tail.detail] if self.tail else None
        with path.open("wb") as file:
            file.write(np.int64(len(self)).tobytes())
            file.write(self._edges.data)
            file.write(json.dumps(tail).encode())

    @classmethod
    def load(cls, file: int, path: Path) -> "Spans":
        """The pieces of `file` that were saved at `path`, in memory that all processes share."""
        count = int(np.fromfile(path, np.int64, 1)[0])
        shape = count, 2
        edges = np.asarray(np.memmap(path, np.int64, "r", 8, shape) if count else np.empty(shape, np.int64))
        with path.open("rb") as saved:
            saved.seek(8 + edges.nbytes)
            tail = json.loads(saved.read())
        return cls(file, edges, Rejected(*tail) if tail else None)


def open_spans(file: int, path: str, kind: str, find: Callable[[int], Spans], cache: FileCache) -> Spans:
    """The pieces of the file at `path`, which is open as `file`: those of a larger one are found once for all
    processes that share the cache. kind: names what `find` takes for a piece.
    """
    if os.fstat(file).st_size <= SCAN_BYTES:
        return find(file)
    found: list[Spans] = []

    def keep(copy: Path) -> None:
        found.append(find(file))
        found[0].save(copy)

    try:
        kept = cache.hold(f"{origin_of(path)} {VERSION} {kind}", keep, ".index")
        spans = Spans.load(file, kept.path)
        weakref.finalize(spans, kept.close)
        return spans
    except (OSError, ValueError):  # of the cache; what is wrong with the file itself comes again
        return found[0] if found else find(file)


def find_lines(file: int, start: int = 0) -> Spans:
    """Lines from byte `start` on, without their "\n"; blank ones left out."""
    edges, line, offset, before = [], start, start, b""
    while block := os.pread(file, SCAN_BYTES, offset):
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + offset
        edges.append(_lines_with_text(line, ends, (before, block), offset - len(before)))
        line = int(ends[-1]) + 1 if len(ends) else line
        offset += len(block)
        before = (before + block[-SHORT:])[-SHORT:]
    edges.append(_lines_with_text(line, np.array([offset]), (before,), offset - len(before)))
    return Spans(file, np.concatenate(edges))


def _lines_with_text(start: int, ends: np.ndarray, texts: Sequence[bytes], offset: int) -> np.ndarray:
    """Edges of the lines that end at `ends`, the first of which begins at `start`; without blank ones.

    `texts`, joined, begin at `offset` of the file, and have every short line of them.
    """
    edges = np.empty((len(ends), 2), np.int64)
    edges[:1, 0], edges[1:, 0], edges[:, 1] = start, ends[:-1] + 1, ends
    short = np.flatnonzero(edges[:, 1] - edges[:, 0] < SHORT)
    if not len(short):
        return edges
    places = edges[short, :1] + np.arange(SHORT) - offset
    is_inside = places < edges[short, 1:] - offset
    signs = np.frombuffer(b"".join(texts) or b" ", np.uint8)[np.where(is_inside, places, 0)]
    return np.delete(edges, short[np.all(IS_SPACE[signs] | ~is_inside, axis=1)], axis=0)


def begins_list(file: int) -> bool:
    """Whether the first character that is not a space opens a JSON list."""
    offset = 0
    while block := os.pread(file, 4096, offset):
        if text := block.removeprefix(b"\xef\xbb\xbf").lstrip():
            return text.startswith(b"[")
        offset += len(block)
    return False


def find_items(file: int) -> Spans:
    """The items of a JSON list. The whole file is in memory meanwhile, its objects are not."""
    # One character a byte, so that positions are byte offsets; JSON's own signs are ASCII.
    text = read_at(file, 0, os.fstat(file).st_size).decode("latin-1")
    decode = json.JSONDecoder(strict=False).raw_decode
    starts, ends, why = [], [], "the list is not closed"
    position = _skip(text, text.index("[") + 1)
    while position < len(text) and text[position] != "]":
        try:
            end = decode(text, position)[1]
        except (ValueError, RecursionError) as error:
            why = str(error)
            break
        starts.append(position)
        ends.append(end)
        position = _skip(text, end)
    tail, whole = None, f"after {len(starts)} records"
    if text[position : position + 1] != "]":
        tail = Rejected("shard_truncated", f"{whole}: {why}")
    elif _skip(text, position + 1) < len(text):
        tail = Rejected("shard_damaged", f"{whole}: more stands behind the end of the list")
    return Spans(file, np.stack([np.array(starts, np.int64), np.array(ends, np.int64)], 1), tail)


def read_at(file: int, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of an open file. Raises Rejected where it ends before, and OSError."""
    pieces = []
    while size > 0:
        piece = os.pread(file, size, offset)
        if not piece:
            raise Rejected("shard_truncated", f"the file ends at byte {offset}")
        pieces.append(piece)
        offset, size = offset + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def decode_utf8(data: bytes) -> str:
    """Without a byte order mark. Raises Rejected("broken_utf8")."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("broken_utf8", str(error)) from error


def parse_object(data: bytes) -> dict[str, Any]:
    """Raises Rejected("broken_utf8", "broken_json"), or "wrong_shape" where it is no object."""
    text = decode_utf8(data)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("broken_json", str(error)[:200]) from error
    if not isinstance(value, dict):
        raise Rejected("wrong_shape", f"the record is a {type(value).__name__}, not an object")
    return value


def _skip(text: str, position: int) -> int:
    """The next sign that is neither a space nor a comma."""
    while position < len(text) and text[position] in " \t\r\n,":
        position += 1
    return position
