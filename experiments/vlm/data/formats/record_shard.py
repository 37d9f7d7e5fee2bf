"""A shard of records and a function from record to draft; what obelics, llava, messages and text share.

Records come from record files (record_files.py), where an image is anything that image_spelling.py knows, or from tars (tar_shard.py).
"""

from collections.abc import Callable
from typing import Any

from experiments.vlm.config import Data
from experiments.vlm.data.document import Document, Image
from experiments.vlm.data.file_cache import file_cache
from experiments.vlm.data.formats import Shard, ShardFile
from experiments.vlm.data.formats.draft import Draft, finish
from experiments.vlm.data.formats.image_values import ImageValues
from experiments.vlm.data.formats.record_files import open_records
from experiments.vlm.data.formats.tar_shard import TarShard, is_tar, record_parser
from experiments.vlm.data.rejects import Rejected

SUFFIXES = (".tar", ".parquet", ".jsonl", ".ndjson", ".json", ".arrow", ".feather")


def open_record_shard(file: ShardFile, data: Data, columns: tuple[str, ...], parse: Callable[[dict[str, Any]], Draft]) -> Shard:
    """columns: what `parse` reads of a record."""
    if is_tar(file.local):
        return TarShard(file, record_parser(parse))
    return RecordShard(file, data, columns, parse)


class RecordShard:
    """Implements formats.Shard. A key is the record's number; an image's locator that and its place in the record."""

    def __init__(self, file: ShardFile, data: Data, columns: tuple[str, ...], parse: Callable[[dict[str, Any]], Draft]):
        self.records = open_records(file.local, columns, file_cache(data))
        self.parse = parse
        self.images = ImageValues(file.path, data)
        self.rejects: list[Rejected] = [self.records.tail] if self.records.tail else []

    def __len__(self) -> int:
        return len(self.records)

    def key(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> tuple[Document, list[Rejected]]:
        draft = self.parse(self.records.get(index))
        self.images.fetch_ahead(draft.images())
        return finish(draft, self.key(index), self.images.size, lambda image: (index, image.position))

    def load(self, image: Image) -> bytes:
        index, position = image.locator
        draft = self.parse(self.records.get(index))
        value = next(found.value for found in draft.images() if found.position == position)
        return self.images.load(value)

    def close(self) -> None:
        self.records.close()
