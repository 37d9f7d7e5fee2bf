"""Files of records, opened for random access: JSON lines, a JSON list, parquet, Arrow.

What a file is, its first bytes tell. A file that ends early gives the records that are whole, and a reject for its tail.
Memory: 16 bytes a record of JSON; of parquet and compressed Arrow the decoded row groups, at most ROW_GROUP_BYTES
a process (and always the one in use).
"""

import functools
import itertools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.vlm.data.formats.spans import begins_list, find_items, find_lines, parse_object
from experiments.vlm.data.rejects import Rejected

ROW_GROUP_BYTES = 256 << 20


class Records(Protocol):
    tail: Rejected | None  # why the file ends early

    def __len__(self) -> int: ...

    def get(self, index: int) -> dict[str, Any]:
        """Raises Rejected."""

    def close(self) -> None: ...


def open_records(path: str, columns: tuple[str, ...]) -> Records:
    """columns: what is wanted of a table. Raises OSError, pyarrow's errors or Rejected where nothing can be read."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PAR1"):
        return ParquetRecords(path, columns)
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
    def __init__(self, path: str, columns: tuple[str, ...]):
        self._file = pq.ParquetFile(path)
        self._columns = [name for name in self._file.schema_arrow.names if name in columns]
        metadata = self._file.metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(rows, dtype=np.int64)
        self._lock = threading.Lock()
        self._number = next(_numbers)
        self.close = weakref.finalize(self, _decoded.forget, self._number)
        self.tail: Rejected | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def get(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        return _row(_decoded.get((self._number, group), lambda: self._read(group)), index - first)

    def _read(self, group: int) -> pa.Table:
        with self._lock:
            try:
                return self._file.read_row_group(group, columns=self._columns, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise Rejected("shard_unreadable", f"row group {group}: {error}") from error


class ArrowRecords:
    """Arrow files (feather) and streams (what Hugging Face `datasets` saves), mapped into memory, so not copied."""

    def __init__(self, path: str, columns: tuple[str, ...]):
        self._source = pa.memory_map(path)
        self.tail: Rejected | None = None
        self._batches = []
        try:
            for batch in _batches(self._source):
                self._batches.append(batch.select([name for name in batch.schema.names if name in columns]))
        except (OSError, pa.ArrowException) as error:
            if not self._batches:
                raise
            self.tail = Rejected("shard_truncated", f"after {len(self._batches)} record batches: {error}")
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def get(self, index: int) -> dict[str, Any]:
        batch = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[batch - 1]) if batch else 0
        return _row(self._batches[batch], index - first)

    def close(self) -> None:
        self._batches = []
        self._source.close()


class _RowGroups:
    """Decoded row groups of all parquet files of the process, the longest unused thrown out."""

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._tables: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int], read: Callable[[], pa.Table]) -> pa.Table:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        table = read()
        with self._lock:
            self._tables[key] = table
            while len(self._tables) > 1 and sum(kept.nbytes for kept in self._tables.values()) > self._limit:
                self._tables.popitem(last=False)
        return table

    def forget(self, file: int) -> None:
        with self._lock:
            for key in [key for key in self._tables if key[0] == file]:
                del self._tables[key]


_decoded = _RowGroups(ROW_GROUP_BYTES)
_numbers = itertools.count()  # of opened parquet files


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
