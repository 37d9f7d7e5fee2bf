"""Files of records, opened for random access: JSON lines, a JSON list, parquet, Arrow.

What a file is, its first bytes tell. A file that ends early gives the records that are whole, and a reject for its tail.
Memory: 16 bytes a record of JSON; of parquet what row_groups.py says.
"""

import functools
import os
import weakref
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from experiments.vlm.data.file_cache import FileCache
from experiments.vlm.data.formats.row_groups import RowGroups
from experiments.vlm.data.formats.spans import begins_list, find_items, find_lines, parse_object
from experiments.vlm.data.rejects import Rejected


class Records(Protocol):
    tail: Rejected | None  # why the file ends early

    def __len__(self) -> int: ...

    def get(self, index: int) -> dict[str, Any]:
        """Raises Rejected."""

    def close(self) -> None: ...


def open_records(path: str, columns: tuple[str, ...], cache: FileCache) -> Records:
    """columns: what is wanted of a table. cache: for row groups. Raises OSError, pyarrow's errors or Rejected where nothing can be read."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PAR1"):
        return ParquetRecords(path, columns, cache)
    if head.startswith(b"ARROW1") or head.startswith(b"\xff\xff\xff\xff"):
        return ArrowRecords(path, columns)
    return JsonRecords(path)


class JsonRecords:
    """A JSON object a line, or a list of objects."""

    def __init__(self, path: str):
        file = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, file)  # at the latest when nobody reads from it any more
        self.tail: Rejected | None = None
        if begins_list(file):
            self._spans, self.tail = find_items(file)
        else:
            self._spans = find_lines(file)

    def __len__(self) -> int:
        return len(self._spans)

    def get(self, index: int) -> dict[str, Any]:
        return parse_object(self._spans.read(index))


class ParquetRecords:
    def __init__(self, path: str, columns: tuple[str, ...], cache: FileCache):
        self._groups = RowGroups(path, columns, cache)
        self._ends = np.cumsum(self._groups.rows, dtype=np.int64)
        self.close = self._groups.close
        self.tail: Rejected | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def get(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        return _row(self._groups.get(group), index - first)


class ArrowRecords:
    """Arrow files (feather) and streams (what Hugging Face `datasets` saves), mapped into memory, so not copied.

    Two things would end the process, so they are looked at first: bytes that are gone since the file was opened (the kernel's
    SIGBUS), and offsets that lead astray (Arrow's own abort), in each record batch once.
    """

    def __init__(self, path: str, columns: tuple[str, ...]):
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size
        self._source = pa.memory_map(path)
        self.tail: Rejected | None = None
        self._batches = []
        self._sound: set[int] = set()  # record batches
        try:
            for batch in _batches(self._source):
                batch.validate()
                self._batches.append(batch.select([name for name in batch.schema.names if name in columns]))
        except (OSError, pa.ArrowException) as error:
            if not self._batches:
                raise
            self.tail = Rejected("shard_truncated", f"after {len(self._batches)} record batches: {error}")
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def get(self, index: int) -> dict[str, Any]:
        if os.fstat(self._file).st_size != self._size:
            raise Rejected("shard_truncated", "its size has changed since it was opened")
        batch = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[batch - 1]) if batch else 0
        self._check(batch)
        return _row(self._batches[batch], index - first)

    def _check(self, batch: int) -> None:
        if batch not in self._sound:
            try:
                for column in self._batches[batch].columns:
                    _check_offsets(column)
            except pa.ArrowException as error:
                raise Rejected("shard_unreadable", f"record batch {batch}: {error}") from error
            self._sound.add(batch)

    def close(self) -> None:
        self._batches = []
        self._source.close()


def _check_offsets(array: pa.Array) -> None:
    """Raises pyarrow.ArrowInvalid. Texts count as bytes: one that is not UTF-8 costs its own record alone."""
    kind = array.type
    if pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            _check_offsets(array.field(number))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        edges = np.concatenate([[0], array.offsets.to_numpy(), [len(array.values)]])
        if np.any(edges[1:] < edges[:-1]):
            raise pa.ArrowInvalid("a list ends before it begins")
        _check_offsets(array.values)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        array.view(pa.binary() if pa.types.is_string(kind) else pa.large_binary()).validate(full=True)
    else:
        array.validate(full=True)


def _row(table: pa.Table | pa.RecordBatch, row: int) -> dict[str, Any]:
    try:
        return {name: _plain(column[row]) for name, column in zip(table.schema.names, table.columns, strict=True)}
    except UnicodeDecodeError as error:
        raise Rejected("broken_utf8", str(error)) from error


def _plain(value: pa.Scalar) -> Any:
    """Python's own types, but binary values as views: of a row with many images one is wanted, or its first bytes."""
    if not value.is_valid:
        return None
    if not _holds_bytes(value.type):
        return value.as_py()
    if pa.types.is_struct(value.type):
        return {name: _plain(value[name]) for name in value}
    if pa.types.is_list(value.type) or pa.types.is_large_list(value.type):
        return [_plain(item) for item in value]
    return memoryview(value.as_buffer())


@functools.cache
def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _batches(source: pa.NativeFile) -> Any:
    try:
        reader = pa.ipc.open_file(source)
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)
