"""The records that docs/data_formats.md shows, read by what training reads them with."""

import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.vlm.config import Columns, Data, Source
from experiments.vlm.data.document import BOS, Image, Special
from experiments.vlm.data.formats import FORMATS
from experiments.vlm.data.sources.shards import open_shard
from tests.samples import encoded, jpeg, noise, write_tar

PAGE = (Path(__file__).parents[2] / "docs" / "data_formats.md").read_text()
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


class Example(NamedTuple):
    format: str
    columns: Columns
    kind: str  # json or tar
    record: str
    reads: str  # as the model does


def examples() -> list[Example]:
    """The records of each section, each with the text that follows it."""
    found = []
    for section in PAGE.split("\n## ")[1:]:
        format, columns = (re.findall(r"^`(\w+)`", section) or ["captions"])[0], Columns()
        blocks = BLOCK.findall(section)
        for (kind, content), (_, reads) in pairwise([*blocks, ("", "")]):
            if kind == "toml":
                (source,) = tomllib.loads(content)["data"]["sources"]
                format, columns = source["format"], Columns(**source["columns"])
            elif kind in ("json", "tar"):
                found.append(Example(format, columns, kind, content, reads))
    return found


def reading(shard, count: int = 1) -> str:
    """What the model reads, what carries loss in brackets."""
    (document, lost), text, loss = shard.read(0), "", False
    assert lost == [] and len(shard) == count
    for part in document.parts:
        if loss != (carries := getattr(part, "loss", False)):
            text += "[" if carries else "]"
            loss = carries
        if isinstance(part, Image):
            assert (part.height, part.width) == (20, 30) and shard.load(part)
            text += "{image}"
        elif part != Special(BOS):
            text += getattr(part, "spelling", getattr(part, "text", ""))
    return (text + "]" * loss).rstrip("\n")


def opened(path: Path, example: Example):
    source = Source(format=example.format, columns=example.columns)
    return open_shard(str(path), source, Data(cache_folder=str(path.parent / "cache")))


def member(line: str) -> tuple[str, bytes]:
    name, _, content = line.partition(" ")
    kinds = {"jpg": "JPEG", "avif": "AVIF", "jp2": "JPEG2000"}
    kind = kinds.get(name.rpartition(".")[2])
    return name, encoded(noise(20, 30), kind) if kind else content.strip().encode()


@pytest.mark.parametrize("example", examples(), ids=lambda example: f"{example.format}-{example.kind}")
def test_an_example_is_read_as_the_page_says(tmp_path, example):
    (tmp_path / "heron.jpg").write_bytes(jpeg(20, 30))
    if example.kind == "tar":
        path = write_tar(tmp_path / "x.tar", map(member, example.record.splitlines()))
    else:
        path = tmp_path / "x.jsonl"
        path.write_text(json.dumps(json.loads(example.record)))
    assert reading(opened(path, example)) == example.reads.removesuffix("\n")


def with_bytes(value, data: bytes):
    """A record as `datasets` pushes it: images with their bytes inside."""
    if isinstance(value, dict) and value.get("path") == "heron.jpg" or value == "heron.jpg":
        return {"bytes": data, "path": "heron.jpg"}
    if isinstance(value, dict):
        return {name: with_bytes(inner, data) for name, inner in value.items()}
    return [with_bytes(inner, data) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "example",
    [example for example in examples() if example.kind == "json" and example.format != "mmc4"],
    ids=lambda example: example.format,
)
def test_an_example_is_read_from_parquet_with_the_images_inside(tmp_path, example):
    record = json.loads(example.record)
    if example.format == "messages":  # a column has one type: contents are lists of items there
        for message in record["messages"]:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    pq.write_table(pa.Table.from_pylist([with_bytes(record, jpeg(20, 30))] * 3), tmp_path / "x.parquet")
    assert reading(opened(tmp_path / "x.parquet", example), 3) == example.reads.removesuffix("\n")


def test_the_page_has_an_example_of_each_format():
    shown = {id(FORMATS[example.format]) for example in examples()}
    assert [name for name, format in FORMATS.items() if id(format) not in shown] == []
    assert all(f"`{name}`" in PAGE for name in FORMATS)
