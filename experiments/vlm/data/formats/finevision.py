"""FineVision, The Cauldron and Docmatix: questions and answers about images that stand before the first one.

{"images": [IMAGE, ...],               none or null for text alone; see image_values.py
 "texts": [{"user": "What is it?", "assistant": "A cat."}, ...]}

An image stands elsewhere where a question says `<image>`: see conversation.place_images.
"""

from collections.abc import Mapping
from typing import Any

from experiments.vlm.data.document import Draft
from experiments.vlm.data.formats.conversation import images_of, make_draft, place_images
from experiments.vlm.data.formats.image_values import IMAGE_EXTENSIONS
from experiments.vlm.data.rejects import Rejected

IMAGES, TEXTS = ("images", "image", *IMAGE_EXTENSIONS), ("texts",)
ROLES = ("user", "assistant")


def fits(record: Mapping[str, Any]) -> bool:
    """Whether its texts are records: in OBELICS they are strings."""
    texts = record.get("texts")
    return isinstance(texts, list) and any(isinstance(row, dict) for row in texts)


def parse(record: Mapping[str, Any]) -> Draft:
    """Turns of text and images; loss falls on the assistant's. Raises Rejected."""
    texts = record.get("texts")
    if not isinstance(texts, list):
        raise Rejected("wrong_shape", f"texts is a {type(texts).__name__}, not a list")
    said = [turn for number, row in enumerate(texts) for turn in _turns(row, number)]
    turns, rejects = place_images(said, images_of(record))
    return make_draft(turns, rejects)


def _turns(row: Any, number: int) -> list[tuple[str, str]]:
    said = row if isinstance(row, dict) else {}
    turns = [(role, said[role]) for role in ROLES if isinstance(said.get(role), str)]
    if len(turns) < len(ROLES):
        raise Rejected("wrong_shape", f"texts[{number}] has no text of user and of assistant")
    return turns
