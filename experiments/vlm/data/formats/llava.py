"""LLaVA conversations: a JSON list or JSON lines (parquet and Arrow too) of

{"image": IMAGE | [IMAGE, ...],        optional; a path begins at the record file's folder; see image_spelling.py
 "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}
"""

import functools
from typing import Any

from experiments.vlm.config import Data, Source
from experiments.vlm.data.chat_template import ChatTemplate, load_chat_template
from experiments.vlm.data.formats import Shard, ShardFile
from experiments.vlm.data.formats.conversation import make_draft, place_images
from experiments.vlm.data.formats.draft import Draft
from experiments.vlm.data.formats.record_shard import SUFFIXES as SUFFIXES
from experiments.vlm.data.formats.record_shard import open_record_shard
from experiments.vlm.data.rejects import Rejected

COLUMNS = ("image", "images", "conversations")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def open_shard(file: ShardFile, source: Source, data: Data) -> Shard:
    return open_record_shard(file, data, COLUMNS, functools.partial(parse, template=load_chat_template(source.chat_template)))


def parse(record: dict[str, Any], template: ChatTemplate) -> Draft:
    conversations = record.get("conversations")
    if not isinstance(conversations, list):
        raise Rejected("wrong_shape", f"conversations is a {type(conversations).__name__}, not a list")
    turns, rejects = place_images([_turn(row, number) for number, row in enumerate(conversations)], images_of(record))
    return make_draft(turns, template, rejects)


def images_of(record: dict[str, Any]) -> list[Any]:
    """The record's images, however many: one by itself, a list, or none."""
    value = record["image"] if record.get("image") is not None else record.get("images")
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def _turn(row: Any, number: int) -> tuple[str, str]:
    if not isinstance(row, dict) or row.get("from") not in ROLES or not isinstance(row.get("value"), str):
        raise Rejected("wrong_shape", f"conversations[{number}] has no text of human or gpt")
    return ROLES[row["from"]], row["value"]
