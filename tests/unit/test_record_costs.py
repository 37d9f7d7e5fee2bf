"""What reading records costs, in operations: each scan, decoding and parsing is done once, not once for each
process, slot or image that asks.
"""

import base64
import errno
import json
import random
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from experiments.vlm.data.document import Image
from experiments.vlm.data.formats import json_index, record_files, row_groups
from experiments.vlm.data.formats.lru_cache import LRUCache
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.file_cache import FileCache
from tests.samples import jpeg
from tests.unit.test_record_formats import RECORDS, damage_row_group, open_records, write_parquet


@pytest.fixture
def decoded(monkeypatch):
    """The numbers of the row groups that are decoded, in files of which none fits memory."""
    numbers, read = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(row_groups, "ROW_GROUP_BYTES", 1)
    monkeypatch.setattr(row_groups, "_kept", LRUCache(1))
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda file, i, **options: numbers.append(i) or read(file, i, **options),
    )
    return numbers


def test_a_row_group_of_a_large_file_is_decoded_once_by_whoever_opens_it(tmp_path, decoded):
    write_parquet(tmp_path / "x.parquet", RECORDS)  # three rows a group
    for _ in range(3):
        shard = open_records(tmp_path / "x.parquet")
        for index in (0, 3, 6, 1, 4):
            assert shard.load(shard.read(index)[0].parts[1]) == jpeg(20 + index, 30)
        shard.close()
    assert sorted(decoded) == [0, 1, 2]


def test_a_cache_without_room_is_told_once_and_costs_no_second_decoding(tmp_path, decoded, monkeypatch):
    def no_room(self, size=0, copy=None):
        raise OSError(errno.ENOSPC, "No space left on device")

    told = []
    monkeypatch.setattr(FileCache, "make_room", no_room)
    monkeypatch.setattr(row_groups.logger, "warning", told.append)
    write_parquet(tmp_path / "x.parquet", RECORDS)
    shard = open_records(tmp_path / "x.parquet")
    assert [shard.read(index)[0].key for index in (0, 3, 1)] == ["0", "3", "1"]
    assert decoded == [0, 1, 0]
    assert len(told) == 1 and "No space left on device" in told[0] and str(tmp_path / "cache") in told[0]


def test_threads_that_want_one_row_group_at_a_time_decode_it_once(tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(row_groups, "ROW_GROUP_BYTES", 1 << 20)
    write_parquet(tmp_path / "x.parquet", RECORDS)
    shard = open_records(tmp_path / "x.parquet")
    with ThreadPoolExecutor(8) as pool:
        assert [document.key for document, _ in pool.map(shard.read, [0, 1, 2] * 8)] == ["0", "1", "2"] * 8
    assert decoded == [0]


@pytest.mark.parametrize("large", [False, True])
def test_a_damaged_row_group_is_decoded_once_for_all_its_records(tmp_path, decoded, monkeypatch, large):
    if not large:
        monkeypatch.setattr(row_groups, "ROW_GROUP_BYTES", 1 << 20)
    write_parquet(tmp_path / "x.parquet", RECORDS)
    damage_row_group(tmp_path / "x.parquet")
    shard = open_records(tmp_path / "x.parquet")
    for index in (3, 4, 5) * 2:
        with pytest.raises(Rejected) as error:
            shard.read(index)
        assert error.value.reason == "shard_unreadable"
    assert decoded == [1]


def test_a_row_group_that_the_storage_did_not_give_is_asked_for_again(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", RECORDS)
    shard, read = open_records(tmp_path / "x.parquet"), pq.ParquetFile.read_row_group

    def away(*arguments, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", away)
    with pytest.raises(OSError):
        shard.read(0)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    assert shard.read(0)[0].key == "0"


def write_lines_of_all_kinds(path) -> list[bytes]:
    """Long and short ones, blank ones, of spaces too; the lines that hold something."""
    draw = random.Random(0)
    lines = [
        draw.choice([b"", b" " * draw.randrange(40), b"x" * draw.randrange(1, 60), b" \t\r", b"  y \r"])
        for _ in range(2000)
    ]
    path.write_bytes(b"\n".join(lines))
    return [line for line in lines if line.strip() or len(line) >= json_index.SHORT]


@pytest.mark.parametrize("block", [7, 64, 1 << 22])
def test_lines_are_those_that_split_gives_wherever_blocks_end(tmp_path, monkeypatch, block):
    expected = write_lines_of_all_kinds(tmp_path / "x.txt")
    monkeypatch.setattr(json_index, "SCAN_BYTES", block)
    with open(tmp_path / "x.txt", "rb") as file:
        spans = json_index.find_lines(file.fileno())
        assert [spans.read(index) for index in range(len(spans))] == expected


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt", "x.tsv"])
def test_a_large_file_is_scanned_once_for_all_processes(tmp_path, monkeypatch, name):
    texts = [f"text {number}" for number in range(300)]
    records = [json.dumps({"text": text}) for text in texts]
    content = {
        "x.jsonl": "\n".join(records),
        "x.json": "[" + ",\n".join(records) + ",",  # a list that is not closed
        "x.txt": "\n".join(texts),
        "x.tsv": "text\n" + "\n".join(texts),
    }
    (tmp_path / name).write_text(content[name])
    monkeypatch.setattr(json_index, "SCAN_BYTES", 1000)
    scans, before = [], {find: getattr(record_files, find) for find in ("find_lines", "find_items")}
    for find, scan in before.items():
        monkeypatch.setattr(record_files, find, lambda *a, scan=scan: scans.append(1) or scan(*a))
    monkeypatch.setattr(record_files.LineRecords.__init__, "__defaults__", ("lines", record_files.find_lines))
    opened = [open_records(tmp_path / name, "text") for _ in range(3)]
    assert len(scans) == 1
    for shard in opened:
        assert [shard.read(i)[0].parts[0].text for i in range(len(shard))] == texts
        assert [wrong.reason for wrong in shard.rejects] == ["shard_truncated"] * (name == "x.json")


def test_without_room_for_the_index_each_opening_scans(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 50)
    (tmp_path / "cache").write_bytes(b"no folder")
    monkeypatch.setattr(json_index, "SCAN_BYTES", 100)
    assert len(open_records(tmp_path / "x.jsonl", "text")) == 50


@pytest.mark.parametrize("format", ["obelics", "messages"])
def test_a_line_is_parsed_once_for_all_its_images(tmp_path, monkeypatch, format):
    images = [base64.b64encode(jpeg(20 + number, 30)).decode() for number in range(40)]
    if format == "obelics":
        record = {"texts": [None] * 40, "images": [{"bytes": image} for image in images]}
    else:
        items = [{"type": "image", "base64": image} for image in images]
        said = {"role": "assistant", "content": [{"type": "text", "text": "Forty."}]}
        record = {"messages": [{"role": "user", "content": items}, said]}
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record))
    parsed, parse = [], json_index.json.loads
    shard = open_records(tmp_path / "x.jsonl", format)
    monkeypatch.setattr(json_index.json, "loads", lambda text: parsed.append(1) or parse(text))
    found = [part for part in shard.read(1)[0].parts if isinstance(part, Image)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(shard.load, found)) == [jpeg(20 + number, 30) for number in range(40)]
    assert parsed == [1]


def test_values_stay_within_their_bound_and_the_longest_unused_go():
    kept: LRUCache[str] = LRUCache(10)
    for name in (1, 2, 3, 1, 4, 5):
        kept.get((0, name), lambda name=name: (str(name), 4))
    made = []
    for name in (5, 4, 1):
        kept.get((0, name), lambda name=name: made.append(name) or (str(name), 4))
    assert made == [1]
    kept.get((1, 1), lambda: ("large", 100))
    assert len(kept) == 1
    kept.forget(1)
    assert len(kept) == 0
