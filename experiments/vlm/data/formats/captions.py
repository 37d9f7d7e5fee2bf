"""An image and its caption under any of the usual names, as a record or as a sample of a tar.

{"url": IMAGE, "caption": "A cat."}        an image is anything that image_values.py knows
KEY.jpg  KEY.txt  KEY.json                 the .txt, or where that is blank "caption" or "text" of the .json
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.vlm.data.document import Draft, ImageValue, Text
from experiments.vlm.data.formats.image_values import IMAGE_EXTENSIONS, is_image_name, split_name
from experiments.vlm.data.rejects import Rejected

# fields called like an image file come first
IMAGES = ("url", "URL", "image_url", "image", "image_path", "path")
TEXTS = ("caption", "text", "TEXT", "txt", "alt_text", "alt")
COLUMNS = (*IMAGE_EXTENSIONS, *IMAGES, *TEXTS)


def fits(record: Mapping[str, Any]) -> bool:
    """Whether it has an image and a field that may be its caption."""
    return image_field(record) is not None and any(name in record for name in TEXTS)


def parse(record: Mapping[str, Any], image: str = "", text: str = "") -> Draft:
    """image, text: names of the two fields; empty: found by their usual names."""
    image = image or image_field(record) or ""
    if record.get(image) is None:
        raise Rejected("image_missing", f"no image among {', '.join(map(str, record))[:200]}")
    texts = (text,) if text else TEXTS
    caption = next((record[name] for name in texts if record.get(name) not in (None, "")), "")
    if not isinstance(caption, str):
        raise Rejected("wrong_shape", f"the caption is a {type(caption).__name__}")
    if not caption or caption.isspace():
        raise Rejected("caption_missing")
    return Draft(
        [ImageValue(record[image], 0, (image,)), Text(caption)],
        caption=True,
        rejects=_swallowed(record, image),
    )


def image_field(record: Mapping[str, Any]) -> str | None:
    """ "jpg" before "0.jpg" before the other names."""
    named: tuple[Iterable[str], ...] = (
        filter(IMAGE_EXTENSIONS.__contains__, record),
        filter(is_image_name, record),
        IMAGES,
    )
    return next((name for name in itertools.chain(*named) if record.get(name) is not None), None)


def _swallowed(record: Mapping[str, Any], image: str) -> list[Rejected]:
    """Samples that differ only after the first dot (a.1.jpg, a.2.jpg) are one in a tar: one is kept."""
    others = [name for name in record if name != image and is_image_name(name)]
    if not others:
        return []
    captioned = {part for part, kind in map(split_name, record) if kind == "txt"} - {split_name(image)[0]}
    lost = [name for name in others if split_name(name)[0] in captioned]
    why = f"has a caption of its own, but a key ends at the first dot: the sample is that of {image}"
    return [Rejected("image_unplaced", f"{name} {why}", image=number) for number, name in enumerate(lost, 1)]
