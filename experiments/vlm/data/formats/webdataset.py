"""Tars in the WebDataset convention: captions (CC12M: `pixparse/cc12m-wds`), interleaved documents and conversations.

KEY.jpg  KEY.txt  KEY.json      an image of any kind and its caption: the .txt, or where that is blank "caption" or "text" of the .json
KEY.json  KEY.0.jpg  ...        {"texts": [...], "images": [...]} as in obelics.py, images by the names of members (tar_shard.py)
                                {"conversations": [...]} or {"messages": [...]} as in llava.py and messages.py
"""

import functools
from typing import Any

from experiments.vlm.config import Data, Source
from experiments.vlm.data.chat_template import ChatTemplate, load_chat_template
from experiments.vlm.data.document import Text
from experiments.vlm.data.formats import ShardFile, llava, messages, obelics
from experiments.vlm.data.formats.draft import Draft, ImageValue
from experiments.vlm.data.formats.spans import decode_utf8, parse_json
from experiments.vlm.data.formats.tar_index import Member
from experiments.vlm.data.formats.tar_shard import IMAGE_EXTENSIONS, Read, TarShard, parse_with_members
from experiments.vlm.data.rejects import Rejected

SUFFIXES = (".tar",)


def open_shard(file: ShardFile, source: Source, data: Data) -> TarShard:
    return TarShard(file, functools.partial(parse, template=load_chat_template(source.chat_template)))


def parse(members: list[Member], read: Read, template: ChatTemplate) -> Draft:
    """A caption with its image, an interleaved document or a conversation. Raises Rejected."""
    text, record = _find(members, ("txt",)), _find(members, ("json",))
    caption = decode_utf8(read(text)) if text else ""
    content = parse_json(read(record)) if record and not caption.strip() else {}
    if not isinstance(content, dict):
        raise Rejected("wrong_shape", f"the .json is a {type(content).__name__}, not an object")
    for name, format in (("conversations", llava), ("messages", messages)):
        if name in content:
            return parse_with_members(functools.partial(format.parse, template=template), content, members)
    if "texts" in content or "images" in content:
        return parse_with_members(obelics.parse, content, members)
    image = _find(members, IMAGE_EXTENSIONS)
    if not image:
        raise Rejected("image_missing", f"no image among {', '.join(member.name for member in members)[:200]}")
    return Draft([ImageValue(image), Text(_caption(caption, content))], caption=True, rejects=_swallowed(members, image))


def _caption(text: str, content: dict[str, Any]) -> str:
    caption = next((content[name] for name in ("caption", "text") if content.get(name)), text)
    if not isinstance(caption, str):
        raise Rejected("wrong_shape", f"the caption is a {type(caption).__name__}")
    if not caption or caption.isspace():
        raise Rejected("caption_missing")
    return caption


def _swallowed(members: list[Member], image: Member) -> list[Rejected]:
    """Samples that differ only after their first dot (a.1.jpg, a.2.jpg) are one to the convention. All but one are lost, so tell."""
    captioned = {member.part for member in members if member.kind == "txt"} - {image.part}
    others = [member.name for member in members if member.kind in IMAGE_EXTENSIONS and member.part in captioned]
    why = "has a caption of its own, but a key ends at the first dot: the sample is that of"
    return [Rejected("image_unplaced", f"{name} {why} {image.name}", image=number) for number, name in enumerate(others, 1)]


def _find(members: list[Member], extensions: tuple[str, ...]) -> Member | None:
    """The member with one of the extensions; "KEY.jpg" before "KEY.0.jpg"."""
    whole = (member for member in members if member.extension in extensions)
    last = (member for member in members if member.kind in extensions)
    return next(whole, None) or next(last, None)
