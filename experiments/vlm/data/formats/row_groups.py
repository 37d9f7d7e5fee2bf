"""The row groups of parquet files as tables, each reached at any time.

A decoded group stays in memory while all of them together take at most ROW_GROUP_BYTES of the process (and
always the one in use). One that is wanted again after that is decoded a second time, written to the cache
folder as Arrow, and from then on mapped: slots read a shard at many places at once, and a group of a gigabyte
would else be decoded for every few samples.
"""

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.file_cache import FileCache, origin_of

ROW_GROUP_BYTES = 256 << 20


class RowGroups:
    """Those of one file. Raises OSError or pyarrow's errors where it is no parquet file."""

    def __init__(self, path: str, columns: tuple[str, ...] | None, cache: FileCache):
        self._file = pq.ParquetFile(path)
        metadata = self._file.metadata
        self.rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if min(self.rows, default=0) < 0 or sum(self.rows) != metadata.num_rows:
            raise Rejected(
                "shard_unreadable", f"its row groups hold {self.rows[:9]} rows, {metadata.num_rows} in all"
            )
        self._columns = [name for name in self._file.schema_arrow.names if columns is None or name in columns]
        self._origin = f"{origin_of(path)} {','.join(self._columns)}"
        self._cache = cache
        self._decoded: set[int] = set()  # in this process, since the file was opened
        self._lock = threading.Lock()
        self._number = next(_numbers)
        self.close = weakref.finalize(self, _kept.forget, self._number)

    def get(self, group: int) -> pa.Table:
        """Raises Rejected."""
        return _kept.get((self._number, group), lambda: self._read(group))

    def _read(self, group: int) -> pa.Table:
        if group in self._decoded:
            try:
                path = self._cache.get(
                    f"{self._origin} {group}", lambda copy: self._write(copy, group), ".arrow"
                )
                return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            except OSError:
                pass  # a full disk, or thrown out of the cache in between
        self._decoded.add(group)
        return self._decode(group)

    def _write(self, copy: Path, group: int) -> None:
        table = self._decode(group)
        with pa.OSFile(str(copy), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)

    def _decode(self, group: int) -> pa.Table:
        with self._lock:
            try:
                return self._file.read_row_group(group, columns=self._columns, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise Rejected("shard_unreadable", f"row group {group}: {error}") from error


class Kept:
    """Row groups of all parquet files of the process, the longest unused thrown out."""

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._tables: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int], read: Callable[[], pa.Table]) -> pa.Table:
        """The row group of that (file, group), from `read` where it is not kept.

        Raises what `read` raises.
        """
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
        """Throw out the row groups of a file that was closed."""
        with self._lock:
            for key in [key for key in self._tables if key[0] == file]:
                del self._tables[key]


_kept = Kept(ROW_GROUP_BYTES)
_numbers = itertools.count()  # of opened parquet files
