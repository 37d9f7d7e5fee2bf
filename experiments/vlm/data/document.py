"""What every format yields: a document, a list of parts in reading order.

    record --parse--> Draft    the parts in order, images as the record names them    (formats/)
    Draft --finish--> Document  images by reference, with their sizes; what is bad left out

Parts that are `Text` and stand next to each other are one text to the tokenizer (a chat turn's header and its
answer share a word boundary, and may share a token); only loss distinguishes them: sample.encode_text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.vlm.data.rejects import Rejected


@dataclass(frozen=True)
class Text:
    """A piece of text, as it is read."""

    text: str
    loss: bool = True  # False: context only, such as a user's turn


BOS, EOS = "{{ bos_token }}", "{{ eos_token }}"  # spellings of the tokenizer's own, whichever they are


@dataclass(frozen=True)
class Special:
    """A special token by its spelling, from a chat template. Never made from a dataset's own text."""

    spelling: str
    loss: bool = False


@dataclass(frozen=True)
class Image:
    """An image by reference. Sizes are after EXIF orientation, read from the header alone."""

    locator: Any  # small and picklable; only the shard that made it understands it
    height: int
    width: int


Part = Text | Special | Image


@dataclass
class Document:
    """What a sample is made of. `key`: its name in its shard, for reports."""

    key: str
    parts: list[Part]
    # it makes no sense without its images (captions, conversations): rejected whole when one fails
    caption: bool = False
    # a chat template wrote it, from its first token to its last: no bos or eos is added
    conversation: bool = False


@dataclass(frozen=True)
class ImageValue:
    """An image as its record names it, not looked at yet."""

    value: Any  # bytes, a path, an address, a member of a tar: see formats/image_values.py
    position: int = 0  # among the images of its record
    place: tuple[str | int, ...] = ()  # where in the record it stands: names of fields and indices of lists


@dataclass(frozen=True)
class Picture:
    """An image in memory. `name`: what errors call it."""

    data: bytes
    name: str = "image"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `content` is text and images in order."""

    role: str  # system, user, assistant, tool
    content: Sequence[str | ImageValue]


@dataclass
class Draft:
    """What a format makes of a record. A conversation has turns, whose parts a chat template makes."""

    parts: list[Text | Special | ImageValue]
    caption: bool = False  # as in Document
    rejects: list[Rejected] = field(default_factory=list)  # images that have no place
    turns: Sequence[Turn] = ()

    def images(self) -> list[ImageValue]:
        """All of them, in order."""
        said = [part for turn in self.turns for part in turn.content]
        return [part for part in self.parts or said if isinstance(part, ImageValue)]


def finish(
    draft: Draft,
    key: str,
    size: Callable[[ImageValue], tuple[int, int]],
    locator: Callable[[ImageValue], Any],
) -> tuple[Document, list[Rejected]]:
    """The document and what it lost. Raises Rejected where nothing is left, or a caption lost its image.

    size: (height, width) of an image, or raises Rejected. locator: what the document keeps to find it again.
    """
    parts: list[Part] = []
    lost = list(draft.rejects)
    for part in draft.parts:
        if isinstance(part, ImageValue):
            try:
                height, width = size(part)
                parts.append(Image(locator(part), height, width))
            except Rejected as rejected:
                lost.append(Rejected(rejected.reason, rejected.detail, image=part.position))
                if draft.caption:
                    raise lost[-1] from None
        elif not isinstance(part, Text) or part.text:
            parts.append(part)
    if not any(
        isinstance(part, Image) or isinstance(part, Text) and not part.text.isspace() for part in parts
    ):
        raise lost[0] if lost else Rejected("empty_document")
    return Document(key, parts, draft.caption, conversation=bool(draft.turns)), lost
