"""Files of records, opened for random access: JSON lines, a JSON list, TSV, parquet, Arrow, lines of text.

The first bytes of a file say what it is, or its name where they cannot (TSV, text, damaged tables). A file
that ends early gives the records that are whole, and a reject for its tail. Memory: see json_index.py for
text, and row_groups.py for parquet.
"""

import itertools
import os
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from experiments.vlm.data.formats.json_index import (
    Spans,
    begins_list,
    decode_utf8,
    find_items,
    find_lines,
    open_spans,
    parse_object,
)
from experiments.vlm.data.formats.lru_cache import LRUCache
from experiments.vlm.data.formats.row_groups import ParquetRecords
from experiments.vlm.data.formats.tables import ArrowRecords
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.file_cache import FileCache

PARSED_BYTES = 16 << 20  # of lines that stay parsed in a process; the last one whatever its size
# columns of a TSV without a head line, by which of them holds addresses
UNNAMED_COLUMNS = {0: ["url", "caption"], 1: ["caption", "url"]}


class Records(Protocol):
    """The records of an open file, by number."""

    tail: Rejected | None  # why the file ends early
    checksum: int  # of where its records lie

    def __len__(self) -> int: ...

    def get(self, index: int) -> dict[str, Any]:
        """Raises Rejected."""

    def close(self) -> None:
        """Closes the file and lets go of what stays parsed of it."""


def open_records(path: str, columns: tuple[str, ...] | None, cache: FileCache) -> Records:
    """columns: what is wanted of a table, None: all. cache: for row groups and places of lines.

    Raises OSError, pyarrow's errors or Rejected where nothing can be read.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    suffix = os.path.splitext(path)[1].lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return ParquetRecords(path, columns, cache)
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) or suffix in (".arrow", ".feather"):
        return ArrowRecords(path, columns)
    if suffix == ".tsv":
        return tsv_records(path, cache)
    if suffix == ".txt" and (columns is None or "txt" in columns):
        return LineRecords(path, lambda line: {"txt": decode_utf8(line).rstrip("\r")}, cache)
    return LineRecords(path, parse_object, cache, "json", find_objects)


class LineRecords:
    """A record a line, or a record wherever else it begins and ends.

    The last ones stay parsed: a record of forty images is asked for each of them, one after the other.
    """

    def __init__(
        self,
        path: str,
        parse: Callable[[bytes], dict[str, Any]],
        cache: FileCache,
        kind: str = "lines",
        find: Callable[[int], Spans] = find_lines,
    ):
        """parse: raises Rejected. find: the records of an open file; cache: for what it found, as `kind`."""
        file = os.open(path, os.O_RDONLY)
        # at the latest when nobody reads from it any more
        self.close = weakref.finalize(self, _close, file, number := next(_numbers))
        self._number = number
        self._spans = open_spans(file, path, kind, find, cache)
        self._parse = parse
        self.tail: Rejected | None = self._spans.tail
        self.checksum = self._spans.checksum()

    def __len__(self) -> int:
        return len(self._spans)

    def get(self, index: int) -> dict[str, Any]:
        """Nobody may change it. Raises Rejected where it cannot be parsed."""
        return _parsed.get((self._number, index), lambda: self._read(index))

    def _read(self, index: int) -> tuple[dict[str, Any], int]:
        data = self._spans.read(index)
        return self._parse(data), len(data)


def _close(file: int, number: int) -> None:
    os.close(file)
    _parsed.forget(number)


_parsed: LRUCache[dict[str, Any]] = LRUCache(PARSED_BYTES)
_numbers = itertools.count()  # of opened files


def find_objects(file: int) -> Spans:
    """JSON objects: one a line, or a list of them."""
    return find_items(file) if begins_list(file) else find_lines(file)


def tsv_records(path: str, cache: FileCache) -> Records:
    """The columns are those of the first line, unless that has an address in it and so is a record."""
    with open(path, "rb") as file:
        line = file.readline()
    names = line.decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
    found = (i for i, name in enumerate(names) if name.lower().startswith(("http://", "https://")))
    address = next(found, None)
    if address is not None:
        names = UNNAMED_COLUMNS[address] if len(names) == 2 else [str(i) for i in range(len(names))]

    def parse(line: bytes) -> dict[str, Any]:
        values = decode_utf8(line).rstrip("\r").split("\t")
        if len(values) != len(names):
            raise Rejected("wrong_shape", f"{len(values)} columns, not {len(names)}")
        return dict(zip(names, values, strict=True))

    start = 0 if address is not None else len(line)
    return LineRecords(path, parse, cache, "table", lambda file: find_lines(file, start))
