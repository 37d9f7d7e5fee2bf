"""Between a record and its document: the parts in order, images not yet looked at.

A format makes a `Draft` of a record; `finish` reads the images' headers, leaves out what is bad and decides whether the
rest still makes sense.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from experiments.vlm.data.document import Document, Image, Part, Special, Text
from experiments.vlm.data.rejects import Rejected


@dataclass(frozen=True)
class ImageValue:
    value: Any  # what the record says: bytes, a path, an address, a member's name
    position: int = 0  # among the images of its record


@dataclass
class Draft:
    parts: list[Text | Special | ImageValue]
    caption: bool = False  # it makes no sense without its images
    rejects: list[Rejected] = field(default_factory=list)

    def images(self) -> list[ImageValue]:
        return [part for part in self.parts if isinstance(part, ImageValue)]


def finish(
    draft: Draft, key: str, size: Callable[[ImageValue], tuple[int, int]], locator: Callable[[ImageValue], Any]
) -> tuple[Document, list[Rejected]]:
    """The document and the images it lost. Raises Rejected where nothing is left, or a caption has lost its image.

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
    if not any(isinstance(part, Image) or isinstance(part, Text) and not part.text.isspace() for part in parts):
        raise lost[0] if lost else Rejected("empty_document")
    return Document(key, parts, draft.caption), lost
