"""Data set formats: from an opened shard to documents, by record number.

A format is a module of this folder, one line in FORMATS, with

    SUFFIXES                            which files of a folder are its shards
    open_shard(file, source, data)      -> Shard

Most formats are a pure function from a record to a `Draft` (draft.py): record files (records.py) and tars (tar.py) do the rest.
Imports no torch; the modules are imported when a source asks for them.
"""

import importlib
from dataclasses import dataclass
from typing import Protocol

from experiments.vlm.config import Data, Source
from experiments.vlm.data.document import Document, Image
from experiments.vlm.data.rejects import Rejected

FORMATS = {
    "cc12m": "experiments.vlm.data.formats.webdataset",
    "webdataset": "experiments.vlm.data.formats.webdataset",
    "obelics": "experiments.vlm.data.formats.obelics",
    "llava": "experiments.vlm.data.formats.llava",
    "messages": "experiments.vlm.data.formats.messages",
    "text": "experiments.vlm.data.formats.text",
}


@dataclass(frozen=True)
class ShardFile:
    path: str  # as the source lists it: what reports say, and where relative images begin
    local: str  # the file to read: the same, or its copy in the cache


class Shard(Protocol):
    """An opened shard: random access by record number. `read` and `load` may be called from several threads."""

    rejects: list[Rejected]  # what is wrong with the shard as a whole, such as a tail that is cut off

    def __len__(self) -> int:
        """Records, good or bad."""

    def key(self, index: int) -> str:
        """The record's name, unique in the shard: the tar key, or its number."""

    def read(self, index: int) -> tuple[Document, list[Rejected]]:
        """The document, and what it lost where it makes sense without. Raises Rejected for a bad record."""

    def load(self, image: Image) -> bytes:
        """The bytes of an image that `read` gave. Raises Rejected."""

    def close(self) -> None: ...


class Format(Protocol):
    SUFFIXES: tuple[str, ...]

    def open_shard(self, file: ShardFile, source: Source, data: Data) -> Shard: ...


def load_format(name: str) -> Format:
    return importlib.import_module(FORMATS[name])  # type: ignore[return-value]
