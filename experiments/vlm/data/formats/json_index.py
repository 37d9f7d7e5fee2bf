"""Pieces of an open file by position: lines, and the items of a JSON list. Found once, read again with pread.

Memory: 16 bytes a piece.
"""

import json
import os
from typing import Any

import numpy as np

from experiments.vlm.data.rejects import Rejected

SCAN_BYTES = 1 << 22


class Spans:
    """Pieces of a file, each from a start to an end. `tail`: why they end early, if they do."""

    def __init__(self, file: int, starts: np.ndarray, ends: np.ndarray, tail: Rejected | None = None):
        self._file, self._starts, self._ends, self.tail = file, starts, ends, tail

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> bytes:
        """The bytes of one piece. Raises Rejected where the file is shorter than it was."""
        start, end = int(self._starts[index]), int(self._ends[index])
        return read_at(self._file, start, end - start)


def find_lines(file: int, start: int = 0) -> Spans:
    """Lines from byte `start` on, without their "\\n"; blank ones left out."""
    breaks, offset = [np.array([start - 1])], start
    while block := os.pread(file, SCAN_BYTES, offset):
        breaks.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + offset)
        offset += len(block)
    edges = np.concatenate([*breaks, [offset]])
    starts, ends = edges[:-1] + 1, edges[1:]
    # Only a short line is looked into: a longer blank one would be a record that is not JSON.
    short = np.flatnonzero(ends - starts < 16)
    blank = [i for i in short if not os.pread(file, int(ends[i] - starts[i]), int(starts[i])).strip()]
    return Spans(file, np.delete(starts, blank), np.delete(ends, blank))


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
    closed = text[position : position + 1] == "]"
    tail = None if closed else Rejected("shard_truncated", f"after {len(starts)} records: {why}")
    return Spans(file, np.array(starts, np.int64), np.array(ends, np.int64), tail)


def read_at(file: int, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of an open file. Raises Rejected where they are not there (any more),
    OSError where the storage does not answer.
    """
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


def parse_json(data: bytes) -> Any:
    """Raises Rejected("broken_utf8" or "broken_json")."""
    text = decode_utf8(data)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("broken_json", str(error)[:200]) from error


def parse_object(data: bytes) -> dict[str, Any]:
    """As parse_json; Rejected("wrong_shape") where it is no object."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise Rejected("wrong_shape", f"the record is a {type(value).__name__}, not an object")
    return value


def _skip(text: str, position: int) -> int:
    """The next sign that is neither a space nor a comma."""
    while position < len(text) and text[position] in " \t\r\n,":
        position += 1
    return position
