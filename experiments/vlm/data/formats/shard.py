"""An opened shard: documents by record number, read in any order, as often as one likes."""

import contextlib
import os
import zlib
from dataclasses import dataclass
from typing import Protocol

from experiments.vlm.config import Data, Source
from experiments.vlm.data.chat_template import load_chat_template
from experiments.vlm.data.document import Document, Draft, Image
from experiments.vlm.data.formats import FORMATS, WEBDATASET, Record
from experiments.vlm.data.formats.record_files import Records, open_records
from experiments.vlm.data.formats.record_shard import ImageValues, RecordShard, folder_of
from experiments.vlm.data.formats.tar_shard import TarShard, is_tar
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.file_cache import file_cache

FIRST = 20  # records that show which format they have
PIECES, PIECE_BYTES = 16, 1 << 16  # of a file, read to distinguish it from another


@dataclass(frozen=True)
class ShardFile:
    """A shard by two paths."""

    path: str  # as the source lists it: what reports say, and where relative images begin
    local: str  # the file to read: the same, or its copy in the cache


class Shard(Protocol):
    """`read` and `load` may be called from several threads."""

    rejects: list[Rejected]  # what is wrong with the shard as a whole, such as a tail that is cut off
    checksum: int  # of its records, wherever the file lies: another checksum, other records

    def __len__(self) -> int:
        """Records, good or bad."""

    def key(self, index: int) -> str:
        """The record's name, unique in the shard: the tar key, or its number."""

    def read(self, index: int) -> tuple[Document, list[Rejected]]:
        """The document, and what it lost where it makes sense without. Raises Rejected for a bad record."""

    def load(self, image: Image) -> bytes:
        """The bytes of an image that `read` gave. Raises Rejected."""

    def close(self) -> None:
        """Closes the file: nothing can be read or loaded any more."""


def open_shard(file: ShardFile, source: Source, data: Data) -> Shard:
    """Raises OSError, pyarrow's errors or Rejected where nothing can be read; ConfigError."""
    format = FORMATS[source.format].under(source.columns.image, source.columns.text)
    template = load_chat_template(source.chat_template)
    if is_tar(file.local):
        return TarShard(
            file.local, format.columns, lambda record: template.speak(format.parse(record)), file_cache(data)
        )
    records = open_records(file.local, format.columns, file_cache(data))
    images = ImageValues(folder_of(file.path), data)
    return RecordShard(records, images, format.parse, template.speak, checksum_of(file.local, records))


def first_records(file: ShardFile, data: Data) -> list[Record]:
    """Some, with all their fields, whatever format they are of. Raises what `open_shard` raises."""
    found: list[Record] = []

    def keep(record: Record) -> Draft:
        found.append(record)
        return Draft([])

    if is_tar(file.local):
        tar = TarShard(file.local, WEBDATASET.columns, keep, file_cache(data))
        for number in range(min(len(tar), FIRST)):
            with contextlib.suppress(Rejected):
                tar.read(number)
        return found
    records = open_records(file.local, None, file_cache(data))
    for number in range(min(len(records), FIRST)):
        with contextlib.suppress(Rejected):
            found.append(records.get(number))
    return found


def checksum_of(path: str, records: Records) -> int:
    """CRC-32 of where a file's records lie, its size and its bytes: of large ones 16 pieces all over it."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        checksum = zlib.crc32(str(size).encode(), records.checksum)
        for number in range(PIECES):
            start = number * max(0, size - PIECES * PIECE_BYTES) // (PIECES - 1) + number * PIECE_BYTES
            checksum = zlib.crc32(os.pread(file.fileno(), PIECE_BYTES, start), checksum)
    return checksum
