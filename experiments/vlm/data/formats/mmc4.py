"""Multimodal C4: sentences, and images each of which was matched to one of them.

{"text_list": ["A heron.", "It stands in the reeds."],
 "image_info": [{"image_name": "b9040a0dbb22.jpg", "raw_url": "https://...", "matched_text_index": 1, ...}]}

An image stands before its sentence. Each entry of `image_info` is an image by itself (image_values.py): a
file where there is one of that name, else an address, or base64. An image without a sentence is left out.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from experiments.vlm.data.document import Draft, ImageValue, Text
from experiments.vlm.data.rejects import Rejected

IMAGES, TEXTS = ("image_info",), ("text_list",)


def parse(record: Mapping[str, Any]) -> Draft:
    """Sentences with a space between them, and images; `rejects`: those without a place. Raises Rejected."""
    sentences, entries = record.get("text_list"), record.get("image_info")
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise Rejected("wrong_shape", "text_list is no list of texts")
    if not isinstance(entries, list | None):
        raise Rejected("wrong_shape", f"image_info is a {type(entries).__name__}, not a list")
    draft = Draft([])
    before: dict[int, list[ImageValue]] = defaultdict(list)
    for position, entry in enumerate(entries or []):
        index = entry.get("matched_text_index") if isinstance(entry, dict) else None
        if isinstance(index, int) and 0 <= index < len(sentences):
            before[index].append(ImageValue(entry, position, ("image_info", position)))
        else:
            why = f"image_info[{position}]: no sentence {index!r} of {len(sentences)}"
            draft.rejects.append(Rejected("image_unplaced", why[:200], image=position))
    for index, sentence in enumerate(sentences):
        draft.parts += before[index]
        if sentence:
            follows = bool(draft.parts) and isinstance(draft.parts[-1], Text)
            draft.parts.append(Text(f" {sentence}" if follows else sentence))
    return draft
