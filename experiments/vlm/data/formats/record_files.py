"""Files of records, opened for random access: JSON lines, a JSON list, TSV, parquet, Arrow, lines of text.

The first bytes of a file say what it is, or its name where they cannot (TSV, text). A file that ends early
gives the records that are whole, and a reject for its tail. Memory: 16 bytes a record of text; of parquet
what row_groups.py says.
"""

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
    parse_object,
)
from experiments.vlm.data.formats.tables import ArrowRecords, ParquetRecords
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.file_cache import FileCache

# of a TSV, by where its first address stands
UNNAMED_COLUMNS = {0: ["url", "caption"], 1: ["caption", "url"]}


class Records(Protocol):
    """The records of an open file, by number."""

    tail: Rejected | None  # why the file ends early

    def __len__(self) -> int: ...

    def get(self, index: int) -> dict[str, Any]:
        """Raises Rejected."""

    def close(self) -> None: ...


def open_records(path: str, columns: tuple[str, ...] | None, cache: FileCache) -> Records:
    """columns: what is wanted of a table, None: all. cache: for row groups.

    Raises OSError, pyarrow's errors or Rejected where nothing can be read.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PAR1"):
        return ParquetRecords(path, columns, cache)
    if head.startswith(b"ARROW1") or head.startswith(b"\xff\xff\xff\xff"):
        return ArrowRecords(path, columns)
    if path.endswith(".tsv"):
        return tsv_records(path)
    if path.endswith(".txt") and (columns is None or "txt" in columns):
        return LineRecords(path, lambda line: {"txt": decode_utf8(line).rstrip("\r")})
    return json_records(path)


class LineRecords:
    """A record a line, or a record wherever else it begins and ends."""

    def __init__(
        self, path: str, parse: Callable[[bytes], dict[str, Any]], find: Callable[[int], Spans] = find_lines
    ):
        """parse: raises Rejected. find: the records of an open file."""
        file = os.open(path, os.O_RDONLY)
        # at the latest when nobody reads from it any more
        self.close = weakref.finalize(self, os.close, file)
        self._spans = find(file)
        self._parse = parse
        self.tail: Rejected | None = self._spans.tail

    def __len__(self) -> int:
        return len(self._spans)

    def get(self, index: int) -> dict[str, Any]:
        """Raises Rejected where it cannot be parsed."""
        return self._parse(self._spans.read(index))


def json_records(path: str) -> Records:
    """A JSON object a line, or a list of objects."""
    return LineRecords(
        path, parse_object, lambda file: find_items(file) if begins_list(file) else find_lines(file)
    )


def tsv_records(path: str) -> Records:
    """The columns are those of the first line, unless that has an address in it and so is a record."""
    with open(path, "rb") as file:
        line = file.readline()
    names = line.decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
    address = next(
        (i for i, name in enumerate(names) if name.lower().startswith(("http://", "https://"))), None
    )
    if address is not None:
        names = UNNAMED_COLUMNS[address] if len(names) == 2 else [str(i) for i in range(len(names))]

    def parse(line: bytes) -> dict[str, Any]:
        values = decode_utf8(line).rstrip("\r").split("\t")
        if len(values) != len(names):
            raise Rejected("wrong_shape", f"{len(values)} columns, not {len(names)}")
        return dict(zip(names, values, strict=True))

    return LineRecords(path, parse, lambda file: find_lines(file, 0 if address is not None else len(line)))
