"""What every format yields: a document, a list of parts in reading order.

Parts that are `Text` and stand next to each other are one text to the tokenizer (a chat turn's header and its answer
share a word boundary, and may share a token); they are told apart only by loss. `encode_texts` does that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Text:
    text: str
    loss: bool = True  # False: context only, such as a user's turn


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
    key: str
    parts: list[Part]
    caption: bool = False  # it makes no sense without its images (captions, conversations): rejected whole when one fails


class OffsetEncoder(Protocol):
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...


def encode_texts(texts: Sequence[Text], tokenizer: OffsetEncoder) -> tuple[list[int], list[bool]]:
    """Token ids of neighbouring texts, tokenised as one, and whether each carries loss.

    A token carries loss if any of its characters does, whether it reaches over a border or holds a part of a character.
    """
    ids, spans = tokenizer.encode_with_offsets("".join(text.text for text in texts))
    carries = [text.loss for text in texts for _ in text.text]
    return ids, [any(carries[start:end]) for start, end in spans]
