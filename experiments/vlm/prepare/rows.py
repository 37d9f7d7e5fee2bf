"""The rows of a piece of an input file, as dictionaries. A row that cannot be read is a Rejected in its place."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.vlm.data.rejects import Rejected

Row = dict | Rejected
BATCH_ROWS = 64  # of parquet, which may hold images: what is in memory at one time


@dataclass(frozen=True)
class Piece:
    """Rows first ... first + rows - 1 of a file. Of text, `offset` is the byte where the first of them begins."""

    file: str
    columns: list[str] | None  # of a TSV; None: the file names its own
    first: int
    rows: int
    offset: int = 0


def read_rows(piece: Piece) -> Iterator[Row]:
    if piece.file.endswith(".parquet"):
        return read_parquet(piece)
    return read_lines(piece)


def read_lines(piece: Piece) -> Iterator[Row]:
    left = piece.rows
    with open(piece.file, "rb") as file:
        file.seek(piece.offset)
        while left and (line := file.readline()):
            if line.strip():
                left -= 1
                yield read_line(line, piece.columns)


def read_line(line: bytes, columns: list[str] | None) -> Row:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return Rejected("broken_utf8", str(error))
    if columns:
        values = text.rstrip("\r\n").split("\t")
        if len(values) != len(columns):
            return Rejected("wrong_shape", f"{len(values)} columns, not {len(columns)}")
        return dict(zip(columns, values, strict=True))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Rejected("broken_json", str(error))
    return value if isinstance(value, dict) else Rejected("wrong_shape", "not a JSON object")


def read_parquet(piece: Piece) -> Iterator[Row]:
    with pq.ParquetFile(Path(piece.file)) as file:
        groups, skip = row_groups(file, piece)
        left = piece.rows
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups):
            part = batch.slice(skip, left)
            skip = max(0, skip - batch.num_rows)
            left -= part.num_rows
            yield from batch_rows(part)
            if not left:
                return


def row_groups(file: pq.ParquetFile, piece: Piece) -> tuple[list[int], int]:
    """The row groups that hold the piece, and the rows to skip in the first of them."""
    groups: list[int] = []
    start = skip = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        if start < piece.first + piece.rows and end > piece.first:
            skip = skip if groups else piece.first - start
            groups.append(group)
        start = end
    return groups, skip


def batch_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # one of the rows: look at each alone
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield Rejected("broken_utf8", str(error))
