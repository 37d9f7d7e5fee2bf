"""Data set formats: how a record becomes a document. A format is a row of FORMATS and one pure function.

    parse(record) -> Draft      a record holds what JSON and tables can; raises Rejected for another shape

The same function reads records of tars and of other files, in training and in data preparation.

formats       captions, conversation (what llava, messages and finevision share), mmc4, obelics, text
image_values  what a record may hold in place of an image
shard         an opened shard of either kind; hint: what to set where no record of a source is good
tars          tar_shard; tar_index (samples by number), tar_search (where they lie), tar_header;
              tar_images (which images a record means), tiff_pages
other files   record_shard (images too); record_files: JSON and TSV (json_index), parquet and Arrow (tables,
              row_groups), text; lru_cache: what stays parsed or decoded

Imports no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from experiments.vlm.data.document import Draft
from experiments.vlm.data.formats import captions, finevision, llava, messages, mmc4, obelics, text
from experiments.vlm.data.formats.image_values import is_image_name
from experiments.vlm.data.rejects import Rejected

Record = Mapping[str, Any]
RECORD_FILES = (".parquet", ".jsonl", ".ndjson", ".json", ".tsv", ".arrow", ".feather")


@dataclass(frozen=True)
class Format:
    """To add one: a file with IMAGES, TEXTS and `parse`, and a row below."""

    images: tuple[str, ...]  # the fields in which `parse` looks for images, the usual one first
    texts: tuple[str, ...]  # and for texts: nothing else of a table is loaded
    parse: Callable[[Record], Draft]
    fits: Callable[[Record], bool]  # whether a record of unknown format may be one of this
    suffixes: tuple[str, ...] = (".tar", *RECORD_FILES)  # which files of a folder are shards

    @property
    def columns(self) -> tuple[str, ...]:
        """All that is read of a record."""
        return *self.images, *self.texts

    def under(self, image: str, text: str) -> "Format":
        """The same format of records with their images and texts under these names; empty: as usual."""
        named = {usual: name for usual, name in ((self.images, image), (self.texts, text)) if name}
        if not named:
            return self
        hidden = {field for usual in named for field in usual}

        def parse(record: Record) -> Draft:
            for name in named.values():
                if name not in record:
                    raise Rejected("wrong_shape", f"no column {name}")
            others = {
                field: value
                for field, value in record.items()
                if field not in hidden and not (image and is_image_name(field))
            }
            return self.parse({**others, **{usual[0]: record[name] for usual, name in named.items()}})

        return replace(
            self,
            images=(image,) if image else self.images,
            texts=(text,) if text else self.texts,
            parse=parse,
        )


def having(*names: str) -> Callable[[Record], bool]:
    """Whether a record has any of these fields."""
    return lambda record: not record.keys().isdisjoint(names)


def format_of(record: Record) -> str | None:
    """The first format that fits."""
    return next((name for name, format in RECORD_FORMATS.items() if format.fits(record)), None)


def parse_sample(record: Record) -> Draft:
    """A sample of a tar in the WebDataset convention, whatever it is: a caption where nothing else fits."""
    formats = (RECORD_FORMATS[name] for name in ("llava", "messages", "finevision", "mmc4", "obelics"))
    fitting = next((format for format in formats if format.fits(record)), RECORD_FORMATS["captions"])
    return fitting.parse(record)


RECORD_FORMATS = {
    "llava": Format(llava.IMAGES, llava.TEXTS, llava.parse, having("conversations")),
    "messages": Format(messages.IMAGES, messages.TEXTS, messages.parse, having("messages")),
    "finevision": Format(finevision.IMAGES, finevision.TEXTS, finevision.parse, finevision.fits),
    "mmc4": Format(mmc4.IMAGES, mmc4.TEXTS, mmc4.parse, having("text_list", "image_info")),
    "obelics": Format(obelics.IMAGES, obelics.TEXTS, obelics.parse, having("texts")),
    "captions": Format(captions.IMAGES, captions.TEXTS, captions.parse, captions.fits),
    "text": Format((), text.TEXTS, text.parse, having("text", "content"), (".tar", ".txt", *RECORD_FILES)),
}
CAPTIONS_FIRST = (RECORD_FORMATS["captions"], *RECORD_FORMATS.values())  # what `under` names is a caption's
WEBDATASET = Format(
    tuple(dict.fromkeys(field for format in CAPTIONS_FIRST for field in format.images)),
    tuple(dict.fromkeys(field for format in CAPTIONS_FIRST for field in format.texts)),
    parse_sample,
    having(),
    (".tar",),
)
FORMATS = {
    "webdataset": WEBDATASET,
    "cc12m": WEBDATASET,
    **RECORD_FORMATS,
    "the_cauldron": RECORD_FORMATS["finevision"],
}
