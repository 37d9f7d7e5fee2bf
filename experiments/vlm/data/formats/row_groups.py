"""Parquet files as records, whose row groups are decoded whole and each reached at any time.

Decoded groups stay in memory while all of them together take at most ROW_GROUP_BYTES of the process (and
always the one in use). Those of a larger file are decoded once for all processes of the machine: written to
the cache folder as Arrow, and mapped from there, since slots read a shard at many places at once, and a group
of a gigabyte would otherwise be decoded for every few samples. The same goes for one of a smaller file that
is wanted again after others took its place. A group that is damaged is decoded once.
"""

import itertools
import threading
import weakref
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.vlm.data.formats.lru_cache import LRUCache
from experiments.vlm.data.formats.tables import Numbers, record_of
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.file_cache import FileCache, origin_of
from experiments.vlm.data.storage.outages import is_away, one_line
from torchtitan.tools.logging import logger

ROW_GROUP_BYTES = 256 << 20


class ParquetRecords:
    """Rows of a file. Raises OSError or pyarrow's errors where it is no parquet file."""

    def __init__(self, path: str, columns: tuple[str, ...] | None, cache: FileCache):
        self._file = pq.ParquetFile(path)
        metadata = self._file.metadata
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        rows = [group.num_rows for group in groups]
        if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
            raise Rejected(
                "shard_unreadable", f"its row groups hold {rows[:9]} rows, {metadata.num_rows} in all"
            )
        self._numbers = Numbers(rows)
        self.checksum = self._numbers.checksum
        self.tail: Rejected | None = None
        self._columns = [name for name in self._file.schema_arrow.names if columns is None or name in columns]
        self._origin = f"{origin_of(path)} {','.join(self._columns)}"
        self._cache = cache
        self._is_large = sum(group.total_byte_size for group in groups) > ROW_GROUP_BYTES
        self._decoded: set[int] = set()  # in this process, since the file was opened
        self._damaged: dict[int, str] = {}
        self._lock = threading.Lock()
        self._number = next(_numbers)
        self.close = weakref.finalize(self, _kept.forget, self._number)

    def __len__(self) -> int:
        return self._numbers.count

    def get(self, index: int) -> dict[str, Any]:
        """Raises Rejected where its row group cannot be read."""
        group, row = self._numbers.find(index)
        return record_of(_kept.get((self._number, group), lambda: self._read(group)), row)

    def _read(self, group: int) -> tuple[pa.Table, int]:
        is_copied = self._is_large or group in self._decoded
        table = self._copied(group) if is_copied else self._decode(group)
        return table, table.nbytes

    def _copied(self, group: int) -> pa.Table:
        """From the cache; decoded, and a warning, where nothing can be kept there."""
        decoded: list[pa.Table] = []

        def write(copy: Path) -> None:
            decoded[:] = decoded or [self._decode(group)]
            self._cache.make_room(decoded[0].nbytes)
            with pa.OSFile(str(copy), "wb") as file, pa.ipc.new_file(file, decoded[0].schema) as writer:
                writer.write_table(decoded[0])

        try:
            copy = self._cache.hold(f"{self._origin} {group}", write, ".arrow")
            table = pa.ipc.open_file(pa.memory_map(str(copy.path))).read_all()
            weakref.finalize(table, copy.close)
        except OSError as error:
            table = decoded[0] if decoded else self._decode(group)
            _warn_of_folder(self._cache.folder, error)
        return table

    def _decode(self, group: int) -> pa.Table:
        self._decoded.add(group)
        with self._lock:
            if group in self._damaged:
                raise Rejected("shard_unreadable", self._damaged[group])
            try:
                return self._file.read_row_group(group, columns=self._columns, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                if is_away(error):
                    raise
                self._damaged[group] = f"row group {group}: {error}"
                raise Rejected("shard_unreadable", self._damaged[group]) from error


def _warn_of_folder(folder: Path, why: OSError) -> None:
    if folder not in _warned:
        _warned.add(folder)
        why_not = f"no row groups can be kept there ({one_line(why)})"
        logger.warning(f"{folder}: {why_not}: each is decoded whenever it is read")


_warned: set[Path] = set()  # folders of this process


_kept: LRUCache[pa.Table] = LRUCache(ROW_GROUP_BYTES)
_numbers = itertools.count()  # of opened parquet files
