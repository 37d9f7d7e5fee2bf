"""LLaVA conversations:

{"image": IMAGE | [IMAGE, ...],        optional; see image_values.py
 "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}
"""

from collections.abc import Mapping
from typing import Any

from experiments.vlm.data.document import Draft
from experiments.vlm.data.formats.conversation import images_of, make_draft, place_images
from experiments.vlm.data.formats.image_values import IMAGE_EXTENSIONS
from experiments.vlm.data.rejects import Rejected

IMAGES, TEXTS = ("image", "images", *IMAGE_EXTENSIONS), ("conversations",)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def parse(record: Mapping[str, Any]) -> Draft:
    """Turns of text and images; loss falls on the assistant's. Raises Rejected."""
    conversations = record.get("conversations")
    if not isinstance(conversations, list):
        raise Rejected("wrong_shape", f"conversations is a {type(conversations).__name__}, not a list")
    said = [_turn(row, number) for number, row in enumerate(conversations)]
    turns, rejects = place_images(said, images_of(record))
    return make_draft(turns, rejects)


def _turn(row: Any, number: int) -> tuple[str, str]:
    who, said = (row.get("from"), row.get("value")) if isinstance(row, dict) else (None, None)
    if not isinstance(who, str) or who not in ROLES or not isinstance(said, str):
        raise Rejected("wrong_shape", f"conversations[{number}] has no text of human or gpt")
    return ROLES[who], said
