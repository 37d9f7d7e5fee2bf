"""An image and its caption, in any of the usual columns: KEY.jpg, KEY.txt, KEY.json (the layout of CC12M)."""

from collections.abc import Mapping
from typing import Any

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.records.record import (
    Members,
    Pictures,
    Record,
    Sources,
    described,
    reference,
    shown,
    to_json,
)

IMAGE_COLUMNS = ("url", "URL", "image_url", "image", "jpg", "png", "webp", "image_path", "path")
TEXT_COLUMNS = ("caption", "text", "TEXT", "txt", "alt_text", "alt")


def fits(row: Mapping) -> bool:
    return any(name in row for name in IMAGE_COLUMNS) and any(name in row for name in TEXT_COLUMNS)


def parse(row: Mapping, sources: Sources) -> Record:
    image = sources.image_column or next((name for name in IMAGE_COLUMNS if name in row), "")
    text = sources.text_column or next((name for name in TEXT_COLUMNS if name in row), "")
    for column in (image, text):
        if column not in row:
            raise Rejected("wrong_shape", f"columns {', '.join(map(str, row))} have no image and text (--image_column, --text_column)")
    caption = row[text]
    if not isinstance(caption, str):
        raise Rejected("wrong_shape", f"{text} is {shown(caption)}, not text")
    if not caption.strip():
        raise Rejected("caption_missing", f"{text} is empty")
    other = {name: value for name, value in row.items() if name not in (image, text) and is_plain(value)}
    return Record([reference(row[image], sources)], {"caption": caption, **other})


def members(record: Record, key: str, pictures: Pictures) -> Members:
    (picture,) = pictures
    if picture is None:
        raise Rejected("image_missing", "a caption is nothing without its image")
    return {
        f"{key}.{picture.extension}": picture.data,
        f"{key}.txt": record.payload["caption"].encode("utf-8", "replace"),
        f"{key}.json": to_json(record.payload | described(picture, record.references[0])),
    }


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))
