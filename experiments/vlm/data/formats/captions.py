"""An image and its caption under any of the usual names, as a record or as a sample of a tar.

{"url": IMAGE, "caption": "A cat."}        an image is anything that image_values.py knows
{"image": IMAGE, "caption": ["A cat.", "A tabby."]}    several captions of an image: a line each
KEY.jpg  KEY.txt  KEY.json                 the .txt, or where that is blank "caption" or "text" of the .json
KEY.0.jpg  KEY.1.png  KEY.txt              several images, numbered: all of them before their caption
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.vlm.data.document import Draft, ImageValue, Text
from experiments.vlm.data.formats.image_values import (
    IMAGE_EXTENSIONS,
    image_fields,
    is_image_name,
    split_name,
)
from experiments.vlm.data.rejects import Rejected

NAMED = ("url", "URL", "image_url", "image", "image_path", "path", "file_name")
IMAGES = (*IMAGE_EXTENSIONS, *NAMED)  # fields called like an image file come first
TEXTS = ("caption", "text", "TEXT", "txt", "alt_text", "alt")
NUMBER = re.compile(r"[0-9]{1,9}$", re.ASCII)


def fits(record: Mapping[str, Any]) -> bool:
    """Whether it has an image and a field that may be its caption."""
    return image_field(record) is not None and any(name in record for name in TEXTS)


def parse(record: Mapping[str, Any], image: str = "", text: str = "", several: bool = True) -> Draft:
    """image, text: the two fields (empty: by usual names). several: numbered images count, else the first."""
    numbered = _numbered(record) if several and not image else []
    image = image or image_field(record) or ""
    if record.get(image) is None:
        raise Rejected("image_missing", f"no image among {', '.join(map(str, record))[:200]}")
    texts = (text,) if text else TEXTS
    caption = _lines(next((record[name] for name in texts if record.get(name) not in (None, "", [])), ""))
    if not caption or caption.isspace():
        raise Rejected("caption_missing")
    images = numbered if image in numbered else [image]
    return Draft(
        [*(ImageValue(record[name], place, (name,)) for place, name in enumerate(images)), Text(caption)],
        caption=True,
        rejects=_left_out(record, images),
    )


def _lines(caption: Any) -> str:
    """A caption, or several of one image. Raises Rejected."""
    captions = caption if isinstance(caption, list) else [caption]
    for one in captions:
        if not isinstance(one, str):
            raise Rejected("wrong_shape", f"the caption is a {type(one).__name__}")
    return "\n".join(one for one in captions if one and not one.isspace())


def _numbered(record: Mapping[str, Any]) -> list[str]:
    """Names of images that differ in a number alone (0.jpg 1.png, img1.jpg img2.jpg, image.0.jpg), in its
    order: those of the first of them. One alone is not numbered, nor are those with captions of their own.
    """
    images = image_fields(record)
    if len(images) < 2:
        return []
    numbers: dict[str, dict[int, str]] = {}  # by what stands before the number; of two alike the first
    for name in images:
        if found := NUMBER.search(split_name(name)[0]):
            numbers.setdefault(found.string[: found.start()], {}).setdefault(int(found[0]), name)
    alike = next(iter(numbers.values()), {})
    captioned = {part for part, kind in map(split_name, record) if kind == "txt"}
    if len(alike) < 2 or not captioned.isdisjoint(split_name(name)[0] for name in alike.values()):
        return []
    return [name for _, name in sorted(alike.items())]


def image_field(record: Mapping[str, Any]) -> str | None:
    """ "jpg" before "0.jpg" before the other names."""
    named: tuple[Iterable[str], ...] = (
        filter(IMAGE_EXTENSIONS.__contains__, record),
        filter(is_image_name, record),
        NAMED,
    )
    return next((name for name in itertools.chain(*named) if record.get(name) is not None), None)


def _left_out(record: Mapping[str, Any], used: Sequence[str]) -> list[Rejected]:
    """The sample's images that are not used. Samples that differ only after the first dot (a.1.jpg, a.2.jpg)
    are one in a tar, and its first image is kept.
    """
    others = [name for name in image_fields(record) if name not in used]
    if not others:
        return []
    captioned = {part for part, kind in map(split_name, record) if kind == "txt"}
    captioned -= {split_name(used[0])[0]}
    own = f"has a caption of its own, but a key ends at the first dot: the sample is that of {used[0]}"
    return [
        Rejected(
            "image_unplaced",
            f"{name} {own if split_name(name)[0] in captioned else f'is one more image, besides {used[0]}'}",
            image=number,
        )
        for number, name in enumerate(others, len(used))
    ]
