"""What both conversation formats share: who says what, and where the images stand."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.vlm.data.document import Draft, ImageValue, Turn
from experiments.vlm.data.formats.image_values import image_fields
from experiments.vlm.data.rejects import Rejected

MARKER = "<image>"


def images_of(record: Mapping[str, Any]) -> list[ImageValue]:
    """The record's images, however many: one by itself, a list, or none. Where it names none, its fields that
    are called like image files, which is what the members of a tar are."""
    name = "image" if record.get("image") is not None else "images"
    value = record.get(name)
    if value is None:
        fields = enumerate(image_fields(record))
        return [ImageValue(record[name], position, (name,)) for position, name in fields]
    if isinstance(value, list):
        return [ImageValue(image, position, (name, position)) for position, image in enumerate(value)]
    return [] if isinstance(value, str) and not value else [ImageValue(value, 0, (name,))]


def make_draft(turns: Sequence[Turn], rejects: Sequence[Rejected] = ()) -> Draft:
    """Whole or not at all: an answer about an image that is gone would teach to make things up."""
    if not turns:
        raise Rejected("empty_document")
    if not any(turn.role == "assistant" for turn in turns):
        raise Rejected("no_answer")
    has_images = any(isinstance(part, ImageValue) for turn in turns for part in turn.content)
    return Draft([], caption=has_images, rejects=list(rejects), turns=turns)


def place_images(
    turns: Sequence[tuple[str, str]], images: Sequence[ImageValue]
) -> tuple[list[Turn], list[Rejected]]:
    """(role, text) with images where the text says `<image>`.

    Without images `<image>` is text, and so it is in answers where the questions account for all images.
    Images without any marker stand before the first question; of too many, the last are left out and
    reported. Raises Rejected for too few.
    """
    asked = sum(text.count(MARKER) for role, text in turns if role != "assistant")
    everywhere = sum(text.count(MARKER) for _, text in turns)
    roles = {"user", "system", "tool"} if asked >= len(images) else {"user", "system", "tool", "assistant"}
    markers = asked if asked >= len(images) else everywhere
    if images and not everywhere:
        turns, markers = _ask_first(turns, len(images)), len(images)
    counts = f"{markers} times {MARKER}, {len(images)} images"
    if images and markers > len(images):
        raise Rejected("image_missing", counts)
    lost = [Rejected("image_unplaced", counts, image=image.position) for image in images[markers:]]
    values, roles = iter(images), roles if images else set()
    return [Turn(role, _split(text, values) if role in roles else [text]) for role, text in turns], lost


def _ask_first(turns: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise Rejected("image_unplaced", "no question that an image could stand in")
    return [
        (role, (MARKER + "\n") * count + text if number == first else text)
        for number, (role, text) in enumerate(turns)
    ]


def _split(text: str, images: Iterator[ImageValue]) -> list[str | ImageValue]:
    pieces: list[str | ImageValue] = []
    for number, piece in enumerate(text.split(MARKER)):
        if number:
            pieces.append(next(images))
        if piece:
            pieces.append(piece)
    return pieces
