"""What both conversation formats share: turns with images to a draft, through the source's chat template."""

from collections.abc import Sequence
from typing import Any

from experiments.vlm.data.chat_template import ChatTemplate, Turn
from experiments.vlm.data.formats.draft import Draft, ImageValue
from experiments.vlm.data.rejects import Rejected

MARKER = "<image>"


def make_draft(turns: Sequence[Turn], template: ChatTemplate, rejects: Sequence[Rejected] = ()) -> Draft:
    """Whole or not at all: an answer about an image that is gone would teach to make things up."""
    if not turns:
        raise Rejected("empty_document")
    if not any(turn.role == "assistant" for turn in turns):
        raise Rejected("no_answer")
    has_images = any(isinstance(part, ImageValue) for turn in turns for part in turn.content)
    return Draft(template.render(turns), caption=has_images, rejects=list(rejects))


def place_images(turns: Sequence[tuple[str, str]], images: Sequence[Any]) -> tuple[list[Turn], list[Rejected]]:
    """(role, text) with images where the text says `<image>`.

    Without images `<image>` is text, and so it is in answers where the questions account for all images. Images without any
    marker stand before the first question; of too many, the last are left out and reported. Raises Rejected for too few.
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
    waiting = [ImageValue(image, position) for position, image in enumerate(images)]
    lost = [
        Rejected("image_unplaced", f"{markers} times {MARKER}, {len(images)} images", image=value.position) for value in waiting[markers:]
    ]
    values = iter(waiting)
    return [Turn(role, _split(text, values) if images and role in roles else [text]) for role, text in turns], lost


def _ask_first(turns: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise Rejected("image_unplaced", "no question that an image could stand in")
    return [(role, (MARKER + "\n") * count + text if number == first else text) for number, (role, text) in enumerate(turns)]


def _split(text: str, images: Any) -> list[str | ImageValue]:
    pieces: list[str | ImageValue] = []
    for number, piece in enumerate(text.split(MARKER)):
        if number:
            pieces.append(next(images))
        if piece:
            pieces.append(piece)
    return pieces
