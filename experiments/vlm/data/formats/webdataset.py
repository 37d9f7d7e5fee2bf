"""Tars in the WebDataset convention: captions (CC12M: `pixparse/cc12m-wds`) and interleaved documents.

KEY.jpg  KEY.txt  KEY.json      an image of any kind and its caption: the .txt, else "caption" or "text" of the .json
KEY.json  KEY.0.jpg  ...        {"texts": [...], "images": [...]} as in obelics.py, images by the names of members (tar_shard.py)
"""

from typing import Any

from experiments.vlm.config import Data, Source
from experiments.vlm.data.document import Text
from experiments.vlm.data.formats import ShardFile, obelics
from experiments.vlm.data.formats.draft import Draft, ImageValue
from experiments.vlm.data.formats.spans import decode_utf8, parse_json
from experiments.vlm.data.formats.tar_index import Member
from experiments.vlm.data.formats.tar_shard import Read, TarShard, name_members
from experiments.vlm.data.rejects import Rejected

SUFFIXES = (".tar",)
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


def open_shard(file: ShardFile, source: Source, data: Data) -> TarShard:
    return TarShard(file, parse)


def parse(members: list[Member], read: Read) -> Draft:
    """A caption with its image, or an interleaved document. Raises Rejected."""
    text, record = _find(members, ("txt",)), _find(members, ("json",))
    content = parse_json(read(record)) if record and not text else None
    if isinstance(content, dict) and ("texts" in content or "images" in content):
        return name_members(obelics.parse(content), members)
    image = _find(members, IMAGE_EXTENSIONS)
    if not image:
        raise Rejected("image_missing", f"no image among {', '.join(member.name for member in members)[:200]}")
    return Draft([ImageValue(image), Text(_caption(read(text) if text else b"", content))], caption=True)


def _caption(text: bytes, content: Any) -> str:
    caption = decode_utf8(text)
    if isinstance(content, dict):
        caption = next((content[name] for name in ("caption", "text") if content.get(name)), "")
    if not isinstance(caption, str):
        raise Rejected("wrong_shape", f"the caption is a {type(caption).__name__}")
    if not caption or caption.isspace():
        raise Rejected("caption_missing")
    return caption


def _find(members: list[Member], extensions: tuple[str, ...]) -> Member | None:
    """The member with one of the extensions; "KEY.jpg" before "KEY.0.jpg"."""
    whole = (member for member in members if member.extension in extensions)
    last = (member for member in members if member.extension.rpartition(".")[2] in extensions)
    return next(whole, None) or next(last, None)
