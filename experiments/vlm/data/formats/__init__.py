"""Data set formats: how a record becomes a document. A format is a row of FORMATS and one pure function.

    parse(record) -> Draft      a record holds what JSON and tables can; raises Rejected for another shape

The same function reads records of tars (tar_shard), and of JSON, TSV, parquet, Arrow and text files
(record_files), in training (shard.open_shard) and in data preparation. Imports no torch.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.vlm.data.document import Draft
from experiments.vlm.data.formats import captions, llava, messages, obelics, text
from experiments.vlm.data.rejects import Rejected

Record = Mapping[str, Any]
RECORD_FILES = (".parquet", ".jsonl", ".ndjson", ".json", ".tsv", ".arrow", ".feather")


@dataclass(frozen=True)
class Format:
    """To add one: a file with COLUMNS and `parse`, and a row below."""

    columns: tuple[str, ...]  # what `parse` reads of a record: nothing else of a table is loaded
    parse: Callable[[Record], Draft]
    fits: Callable[[Record], bool]  # whether a record of unknown format may be one of this
    suffixes: tuple[str, ...] = (".tar", *RECORD_FILES)  # which files of a folder are shards


def having(*names: str) -> Callable[[Record], bool]:
    """Whether a record has any of these fields."""
    return lambda record: not record.keys().isdisjoint(names)


def format_of(record: Record) -> str | None:
    """The first format that fits."""
    return next((name for name, format in RECORD_FORMATS.items() if format.fits(record)), None)


def fitting(record: Record) -> str | None:
    """The first format that makes a document of it."""
    for name, format in RECORD_FORMATS.items():
        with contextlib.suppress(Rejected):
            if (format.fits(record) or name == "text") and format.parse(record):
                return name
    return None


def parse_sample(record: Record) -> Draft:
    """A sample of a tar in the WebDataset convention, whatever it is: a caption where nothing else fits."""
    formats = (RECORD_FORMATS[name] for name in ("llava", "messages", "obelics"))
    return next((format for format in formats if format.fits(record)), RECORD_FORMATS["captions"]).parse(
        record
    )


RECORD_FORMATS = {
    "llava": Format(llava.COLUMNS, llava.parse, having("conversations")),
    "messages": Format(messages.COLUMNS, messages.parse, having("messages")),
    "obelics": Format(obelics.COLUMNS, obelics.parse, having("texts", "images")),
    "captions": Format(captions.COLUMNS, captions.parse, captions.fits),
    "text": Format(text.COLUMNS, text.parse, having("text", "content"), (".tar", ".txt", *RECORD_FILES)),
}
COLUMNS = tuple({name for format in RECORD_FORMATS.values() for name in format.columns})
WEBDATASET = Format(COLUMNS, parse_sample, having(), (".tar",))
FORMATS = {"webdataset": WEBDATASET, "cc12m": WEBDATASET, **RECORD_FORMATS}
