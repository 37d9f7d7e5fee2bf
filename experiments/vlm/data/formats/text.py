"""Text alone, so that a mixture can carry language: documents of record files, tars and plain text.

.jsonl .json .parquet .arrow    the string "text" of each record, else "content"
.tar                            KEY.txt, else "text" or "content" of KEY.json
.txt                            a document a line
"""

import os
import weakref
from typing import Any

from experiments.vlm.config import Data, Source
from experiments.vlm.data.document import Document, Image, Text
from experiments.vlm.data.formats import Shard, ShardFile
from experiments.vlm.data.formats.draft import Draft, finish
from experiments.vlm.data.formats.record_shard import SUFFIXES as RECORD_SUFFIXES
from experiments.vlm.data.formats.record_shard import RecordShard
from experiments.vlm.data.formats.spans import decode_utf8, find_lines, parse_object
from experiments.vlm.data.formats.tar_index import Member
from experiments.vlm.data.formats.tar_shard import Read, TarShard, is_tar
from experiments.vlm.data.rejects import Rejected

SUFFIXES = (*RECORD_SUFFIXES, ".txt")
COLUMNS = ("text", "content")


def open_shard(file: ShardFile, source: Source, data: Data) -> Shard:
    if file.local.endswith(".txt"):
        return LineShard(file)
    if is_tar(file.local):
        return TarShard(file, parse_members)
    return RecordShard(file, data, COLUMNS, parse)


def parse(record: dict[str, Any]) -> Draft:
    value = next((record[name] for name in COLUMNS if record.get(name) is not None), None)
    if not isinstance(value, str):
        raise Rejected("wrong_shape", f"no string under {' or '.join(COLUMNS)}")
    return Draft([Text(value)])


def parse_members(members: list[Member], read: Read) -> Draft:
    found = {member.extension: member for member in members}
    if "txt" in found:
        return Draft([Text(decode_utf8(read(found["txt"])))])
    if "json" not in found:
        raise Rejected("wrong_shape", "neither .txt nor .json in the sample")
    return parse(parse_object(read(found["json"])))


class LineShard:
    """Implements formats.Shard. A key is the number of the line, blank ones not counted."""

    def __init__(self, file: ShardFile):
        descriptor = os.open(file.local, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, descriptor)
        self.lines = find_lines(descriptor)
        self.rejects: list[Rejected] = []

    def __len__(self) -> int:
        return len(self.lines)

    def key(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> tuple[Document, list[Rejected]]:
        draft = Draft([Text(decode_utf8(self.lines.read(index)).rstrip("\r"))])
        return finish(draft, self.key(index), _no_image, _no_image)

    def load(self, image: Image) -> bytes:
        return _no_image(image)


def _no_image(image: Any) -> Any:
    raise Rejected("image_missing", "a text has no images")
