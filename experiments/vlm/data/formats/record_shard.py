"""A shard of a record file and a function from record to draft; what obelics, llava, messages and text share."""

from collections.abc import Callable
from typing import Any

from experiments.vlm.config import Data
from experiments.vlm.data.document import Document, Image
from experiments.vlm.data.formats import ShardFile
from experiments.vlm.data.formats.draft import Draft, finish
from experiments.vlm.data.formats.image_values import ImageValues
from experiments.vlm.data.formats.record_files import open_records
from experiments.vlm.data.rejects import Rejected

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".arrow", ".feather")


class RecordShard:
    """Implements formats.Shard. A key is the record's number; an image's locator that and its place in the record."""

    def __init__(self, file: ShardFile, data: Data, columns: tuple[str, ...], parse: Callable[[dict[str, Any]], Draft]):
        self.records = open_records(file.local, columns)
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
