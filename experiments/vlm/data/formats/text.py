"""Text alone, so that a mixture can carry language: a string under "text", else "content" (in tars KEY.txt or
KEY.json, of .txt files a document a line)."""

from collections.abc import Mapping
from typing import Any

from experiments.vlm.data.document import Draft, Text
from experiments.vlm.data.rejects import Rejected

TEXTS = ("text", "content", "txt")


def parse(record: Mapping[str, Any]) -> Draft:
    """One text. Raises Rejected where there is no string."""
    value = next((record[name] for name in TEXTS if record.get(name) is not None), None)
    if not isinstance(value, str):
        raise Rejected("wrong_shape", f"no string under {' or '.join(TEXTS[:2])}")
    return Draft([Text(value)])
