"""Tables as records: Arrow files here, parquet in row_groups.py. Bytes come as views: of many images only one
is copied.
"""

import functools
import os
import weakref
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.outages import is_away


class Numbers:
    """Rows that are numbered through several groups, of so many rows each."""

    def __init__(self, rows: Sequence[int]):
        self._ends = np.cumsum(rows, dtype=np.int64)
        self.count = int(self._ends[-1]) if len(self._ends) else 0
        self.checksum = zlib.crc32(str(rows).encode())

    def find(self, index: int) -> tuple[int, int]:
        """(group, row in it) of the row of that number."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)


class ArrowRecords:
    """Arrow files (feather) and streams (what Hugging Face `datasets` saves), mapped into memory.

    Two things would end the process, so they are looked at first: bytes that are gone since the file was
    opened (the kernel's SIGBUS), and offsets that lead astray (Arrow's own abort), in each record batch once.
    """

    def __init__(self, path: str, columns: tuple[str, ...] | None):
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
                self._batches.append(
                    batch.select([name for name in batch.schema.names if columns is None or name in columns])
                )
        except (OSError, pa.ArrowException) as error:
            if is_away(error) or not self._batches:
                raise
            self.tail = Rejected("shard_truncated", f"after {len(self._batches)} record batches: {error}")
        except Rejected as rejected:
            self.tail = rejected
        except KeyError as error:
            raise Rejected("shard_unreadable", f"two columns of one name: {error}") from error
        self._numbers = Numbers([batch.num_rows for batch in self._batches])
        self.checksum = self._numbers.checksum

    def __len__(self) -> int:
        return self._numbers.count

    def get(self, index: int) -> dict[str, Any]:
        """Raises Rejected where the file has changed or its record batch is broken."""
        if os.fstat(self._file).st_size != self._size:
            raise Rejected("shard_truncated", "its size has changed since it was opened")
        batch, row = self._numbers.find(index)
        self._check(batch)
        return record_of(self._batches[batch], row)

    def _check(self, batch: int) -> None:
        if batch not in self._sound:
            try:
                for column in self._batches[batch].columns:
                    _check_offsets(column)
            except pa.ArrowException as error:
                raise Rejected("shard_unreadable", f"record batch {batch}: {error}") from error
            self._sound.add(batch)

    def close(self) -> None:
        """Unmaps the file."""
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


def record_of(table: pa.Table | pa.RecordBatch, row: int) -> dict[str, Any]:
    """A row as a record. Raises Rejected."""
    try:
        return {
            name: _plain(column[row]) for name, column in zip(table.schema.names, table.columns, strict=True)
        }
    except UnicodeDecodeError as error:
        raise Rejected("broken_utf8", str(error)) from error
    except (ValueError, OverflowError, pa.ArrowException) as error:  # a date that Python does not know
        raise Rejected("wrong_shape", str(error)[:200]) from error


def _plain(value: pa.Scalar) -> Any:
    """Python's own types, but binary values as views: of many images one is wanted, or its first bytes."""
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


def _batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    try:
        reader = pa.ipc.open_file(source)
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        source.seek(0)
        return _of_stream(source)


def _of_stream(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    yield from pa.ipc.open_stream(source)
    if left := source.size() - source.tell():
        raise Rejected("shard_damaged", f"its stream ends {left} bytes before the file: are two in it?")
