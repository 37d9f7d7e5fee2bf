"""What to set for a source, where none of its records is good: one line for people."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

from experiments.vlm.config import Source
from experiments.vlm.data.formats import FORMATS, RECORD_FORMATS, Record, format_of
from experiments.vlm.data.formats.image_values import is_image_name, name_of
from experiments.vlm.data.formats.tar_header import Member
from experiments.vlm.data.rejects import Rejected

SHOWN = 8  # fields
CONVERSATIONS = ("messages", "llava", "finevision")
CAPTION_WORDS = ("caption", "description", "text", "alt", "title", "prompt")  # in the names of captions


def hint(records: Sequence[Record], source: Source) -> str:
    """The format, or the columns, that would fit most of these records; empty where nothing would."""
    if apart := _keys_apart(records):
        return apart
    absent = [name for name in vars(source.columns).values() if name and not any(name in r for r in records)]
    if records and absent:
        return f"its records have no column {absent[0]}, but {_fields(records[0])}: correct columns"
    if any(vars(source.columns).values()) and any(_fits(record, source) for record in records):
        return ""  # what is wrong lies in its images
    image = _image_column(records) if records else None
    unfit = ("text",) if image else ()  # it would leave the images out
    fits = Counter(name for record in records if (name := _fitting(record)) and name not in unfit)
    if fits and FORMATS[best := fits.most_common(1)[0][0]] is not FORMATS[source.format]:
        return f"its records are of format {best}, not {source.format}: set format = '{best}'"
    if fits or not records:
        return ""
    unknown = f"no format knows its records, whose fields are {_fields(records[0])}"
    if turns := next(filter(None, map(_turns_column, records)), None):
        return f"{unknown}: {_setting(turns[0], image, turns[1])}"
    if any(format_of(record) not in (None, *unfit) for record in records):
        return ""
    if image and not isinstance(records[0][image], list) and (text := _text_column(records)):
        return f"{unknown}: {_setting('captions', image, text)}"
    return f"{unknown}: say which are meant with columns = {{image = ..., text = ...}}, or add a format"


def _keys_apart(records: Sequence[Record]) -> str:
    """A hint for tars in which no sample has both an image and a text, since their members share no key."""
    images = [
        [value for name, value in record.items() if isinstance(value, Member) and is_image_name(name)]
        for record in records
    ]
    both = any(len(found) < len(record) for found, record in zip(images, records, strict=True) if found)
    if both or all(images) or not any(images):
        return ""
    (image, *_), *_ = filter(None, images)
    return (
        f"no sample has an image and a text: {image.name} is one by itself, since a sample is the members "
        f"that share what stands before the first dot; call the images of KEY.txt KEY.0.{image.kind}, ..."
    )


def _setting(format: str, image: str | None, text: str) -> str:
    usual = image is None or image in RECORD_FORMATS[format].images
    columns = ", ".join(([] if usual else [f'image = "{image}"']) + [f'text = "{text}"'])
    return f"set format = '{format}' and columns = {{{columns}}}"


def _turns_column(record: Record) -> tuple[str, str] | None:
    """The format of conversations that reads one of its fields, and which."""
    for name, field in product(CONVERSATIONS, record):
        with contextlib.suppress(Rejected):
            if RECORD_FORMATS[name].under("", str(field)).parse({field: record[field]}):
                return name, str(field)
    return None


def _fits(record: Record, source: Source) -> bool:
    """Whether the source's own format, under its columns, makes a document of it."""
    with contextlib.suppress(Rejected):
        own = FORMATS[source.format].under(source.columns.image, source.columns.text)
        return bool(own.parse(record))
    return False


def _fitting(record: Record) -> str | None:
    """The first format that makes a document of it."""
    for name, format in RECORD_FORMATS.items():
        with contextlib.suppress(Rejected):
            if (format.fits(record) or name == "text") and format.parse(record):
                return name
    return None


def _fields(record: Record) -> str:
    named = ", ".join(list(map(str, record))[:SHOWN])
    return named + (", ..." if len(record) > SHOWN else "")


def _image_column(records: Sequence[Record]) -> str | None:
    return next((name for name in records[0] if all(_is_image(r.get(name)) for r in records)), None)


def _is_image(value: Any) -> bool:
    """By its type, or by how its path, address or beginning is spelled; or several of them."""
    if isinstance(value, list) and value:
        return all(map(_is_image, value))
    if isinstance(value, Member | bytes | memoryview):
        return True
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes | memoryview):
        return True
    name = value if isinstance(value, str) else name_of(value)
    return name.startswith("data:image/") or is_image_name(name.partition("?")[0].lower())


def _text_column(records: Sequence[Record]) -> str | None:
    """The column of texts that is called like a caption, of several the one with the longest texts; else the
    only one.
    """
    sizes = {
        name: sum(len(record[name]) for record in records)
        for name in records[0]
        if all(isinstance(r.get(name), str) and not _is_image(r[name]) for r in records)
    }
    likely = [name for name in sizes if any(word in name.lower() for word in CAPTION_WORDS)]
    if likely:
        return max(likely, key=sizes.__getitem__)
    return next(iter(sizes)) if len(sizes) == 1 else None
