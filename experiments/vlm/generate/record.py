"""A record that asks something, in the spellings of training data.

{"prompt": "What is it?", "images": [IMAGE, ...]}          `<image>` in the text says where an image stands
{"messages": [{"role": "user", "content": ...}, ...]}      see data/formats/messages.py; the last one asks
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.vlm.data.document import Draft, ImageValue, Picture
from experiments.vlm.data.formats import messages
from experiments.vlm.data.formats.conversation import MARKER, images_of
from experiments.vlm.data.formats.record_shard import ImageValues
from experiments.vlm.data.rejects import Rejected, meaning
from experiments.vlm.generate.prompt import Prompt, Prompter, Turns
from torchtitan.config.errors import UserError

NOT_READ = ("question", "query", "text", "conversations")  # that other records ask in
LIKE_IMAGES = re.compile(
    r"(image|img|picture|photo)s?_?(\d+|(file_?)?names?|files?|paths?|urls?|ids?|bytes|base64)?"
)


def prompt_of(record: Mapping[str, Any], images: ImageValues, prompter: Prompter) -> Prompt:
    """Raises UserError that says what is wrong with the record, or names the image."""
    return prompter.prompt(turns_of(record, images, prompter.template is not None))


def content_of(text: str, pictures: Sequence[Picture]) -> list[str | Picture]:
    """A text with pictures where it says `<image>`, else before it. Raises UserError."""
    first, *others = text.split(MARKER) if pictures else [text]
    if not others:
        return [*pictures, *filter(None, [text])]
    if len(others) != len(pictures):
        raise UserError(f"{len(others)} times {MARKER}, {len(pictures)} images: give as many")
    placed = [part for pair in zip(pictures, others, strict=True) for part in pair]
    return [part for part in (first, *placed) if part]


def turns_of(record: Mapping[str, Any], images: ImageValues, breaks: bool = True) -> Turns:
    """(role, texts and pictures) of each message. Raises UserError.

    breaks: an image that no text places has a line break behind it, as in conversations; not so in documents.
    """
    asked = record.get("messages")
    if asked is None:
        if "prompt" not in record and (elsewhere := [name for name in NOT_READ if record.get(name)]):
            raise UserError(f"{elsewhere[0]} is not read: what is asked stands in prompt or messages")
        text = record.get("prompt", "")
        if not breaks and isinstance(text, str) and MARKER not in text:
            text = MARKER * len(images_of(record)) + text
        asked = [{"role": "user", "content": text}]
    elif not isinstance(asked, list) or not asked:
        raise UserError("messages is no list of messages")
    elif isinstance(asked[-1], dict) and asked[-1].get("role") == "assistant":
        raise UserError("the last of messages is the assistant's: it has to be one that asks")
    # Training data end with an answer; here one is added, and taken off again.
    whole = {**record, "messages": [*asked, {"role": "assistant", "content": ""}]}
    try:
        draft = parse_whole(whole)
        return [(turn.role, [_picture(part, images) for part in turn.content]) for turn in draft.turns[:-1]]
    except Rejected as rejected:
        detail = f" ({rejected.detail})" if rejected.detail else ""
        raise UserError(f"{meaning(rejected.reason)}{detail}") from None


def parse_whole(record: Mapping[str, Any]) -> Draft:
    """Its conversation. Raises Rejected for an image without a place, and where no image was found though a
    field is called like one.
    """
    draft = messages.parse(record)
    for lost in draft.rejects:
        raise Rejected(lost.reason, lost.detail)
    if not draft.images() and record.keys().isdisjoint(messages.IMAGES):
        for name, value in record.items():
            if LIKE_IMAGES.fullmatch(name.lower()) and value not in (None, "", [], {}):
                raise Rejected("wrong_shape", f"{name} is not read: images stand in image or images")
    return draft


def _picture(part: str | ImageValue, images: ImageValues) -> str | Picture:
    if isinstance(part, str):
        return part
    name = part.value if isinstance(part.value, str) and len(part.value) < 200 else f"image {part.position}"
    return Picture(images.load(part.value), name)
