"""OBELICS and text from every kind of record file, and what is wrong with them."""

import base64
import json
import os
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.vlm.config import Data, Source
from experiments.vlm.data.document import Image, Text
from experiments.vlm.data.formats import row_groups
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.shards import open_shard
from tests.samples import jpeg, write_jsonl, write_tar

RECORDS = [
    {"texts": ["one", None, f"two {n}"], "images": [None, {"bytes": jpeg(20 + n, 30), "path": None}, None]}
    for n in range(7)
]
SCHEMA = pa.schema(
    [
        ("texts", pa.list_(pa.string())),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ]
)


def plain(record):
    """Bytes as base64, for JSON."""
    images = [
        image and {**image, "bytes": base64.b64encode(image["bytes"]).decode()} for image in record["images"]
    ]
    return {**record, "images": images}


def write_json(path, records):
    path.write_text(json.dumps([plain(record) for record in records], indent=1, ensure_ascii=False))


def write_lines(path, records):
    path.write_text("".join(json.dumps(plain(record)) + "\n\n" for record in records))


def write_parquet(path, records):
    pq.write_table(pa.Table.from_pylist(records, SCHEMA), path, row_group_size=3)


def write_stream(path, records):
    table = pa.Table.from_pylist(records, SCHEMA)
    with pa.ipc.new_stream(path, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=3)


def write_feather(path, records):
    table = pa.Table.from_pylist(records, SCHEMA)
    with pa.ipc.new_file(path, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=3)


WRITERS = {
    "x.json": write_json,
    "x.jsonl": write_lines,
    "x.parquet": write_parquet,
    "x.arrow": write_stream,
    "x.feather": write_feather,
}


def open_records(path, format="obelics"):
    return open_shard(str(path), Source(format=format), Data(cache_folder=str(path.parent / "cache")))


def open_lines(tmp_path, *records, format="obelics"):
    return open_records(write_jsonl(tmp_path / "x.jsonl", records), format)


def reason(shard, index):
    with pytest.raises(Rejected) as error:
        shard.read(index)
    return error.value.reason


@pytest.mark.parametrize("name", WRITERS)
def test_every_record_file_gives_the_same_documents_in_any_order(tmp_path, name):
    WRITERS[name](tmp_path / name, RECORDS)
    shard = open_records(tmp_path / name)
    assert len(shard) == 7 and shard.rejects == []
    for index in (6, 0, 3, 2, 5, 1, 4):
        document, lost = shard.read(index)
        first, image, last = document.parts
        assert (document.key, document.caption, lost) == (str(index), False, [])
        assert (first, last) == (Text("one"), Text(f"two {index}"))
        assert (image.height, image.width) == (20 + index, 30)
        assert shard.load(image) == jpeg(20 + index, 30)
    shard.close()


@pytest.fixture
def only_one_kept(monkeypatch):
    """Memory for one row group at a time; and the numbers of those that are decoded."""
    kept, decoded, read = row_groups.LRUCache(limit_bytes=1), [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(row_groups, "_kept", kept)
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda file, i, **options: decoded.append(i) or read(file, i, **options),
    )
    return kept, decoded


def test_decoded_row_groups_stay_within_their_bound(tmp_path, only_one_kept):
    kept, _ = only_one_kept
    write_parquet(tmp_path / "x.parquet", RECORDS)
    shard = open_records(tmp_path / "x.parquet")
    for index in range(7):
        shard.read(index)
        assert len(kept) == 1
    shard.close()
    assert len(kept) == 0


def test_a_row_group_is_decoded_twice_at_most_however_often_slots_come_back(tmp_path, only_one_kept):
    write_parquet(tmp_path / "x.parquet", RECORDS)  # three rows a group
    shard = open_records(tmp_path / "x.parquet")
    for _ in range(4):
        for index in (0, 3, 6):
            image = shard.read(index)[0].parts[1]
            assert shard.load(image) == jpeg(20 + index, 30)
    assert sorted(only_one_kept[1]) == [0, 0, 1, 1, 2, 2]


def test_without_room_in_the_cache_row_groups_are_decoded_again(tmp_path, only_one_kept):
    write_parquet(tmp_path / "x.parquet", RECORDS)
    (tmp_path / "cache").write_bytes(b"no folder")
    shard = open_shard(
        str(tmp_path / "x.parquet"), Source(format="obelics"), Data(cache_folder=str(tmp_path / "cache"))
    )
    assert [shard.read(index)[0].key for index in (0, 3) * 3] == ["0", "3"] * 3


def test_a_list_of_images_only_and_a_list_of_texts_only(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    shard = open_lines(
        tmp_path, {"texts": ["one", "two"]}, {"texts": [None, None], "images": ["a.jpg", "a.jpg"]}
    )
    assert shard.read(0)[0].parts == [Text("one"), Text("two")]
    assert [type(part) for part in shard.read(1)[0].parts] == [Image, Image]


@pytest.mark.parametrize(
    ("record", "parts", "lost"),
    [
        # more images than text slots
        ({"texts": ["one", None], "images": [None, "a.jpg", "a.jpg", "a.jpg"]}, "tI", [1, 2]),
        ({"texts": ["one", "two"], "images": ["a.jpg", None]}, "tt", [0]),  # both at one index
        # more texts than images
        ({"texts": ["one", None, "two", "three"], "images": [None, "a.jpg"]}, "tItt", []),
        ({"texts": ["one", None, None], "images": [None, None, "a.jpg"]}, "tI", []),  # neither at one index
        ({"texts": ["", None], "images": [None, "a.jpg"]}, "I", []),
        ({"texts": ["one", None, None], "images": [None, "gone.jpg", "a.jpg"]}, "tI", [0]),
    ],
)
def test_of_lists_that_do_not_match_what_makes_sense_is_kept(tmp_path, record, parts, lost):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    document, rejects = open_lines(tmp_path, record).read(0)
    assert "".join("t" if isinstance(part, Text) else "I" for part in document.parts) == parts
    assert [reject.image for reject in rejects] == lost


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"texts": ["one"', "broken_json"),
        (b'{"texts": ["caf\xe9"]}', "broken_utf8"),
        (b'["texts"]', "wrong_shape"),
        (b"17", "wrong_shape"),
        (b'{"text": "one"}', "wrong_shape"),
        (b'{"texts": "one"}', "wrong_shape"),
        (b'{"texts": [1]}', "wrong_shape"),
        (b'{"texts": ["one"], "images": "a.jpg"}', "wrong_shape"),
        (b'{"texts": [], "images": []}', "empty_document"),
        (b'{"texts": [null, "  "], "images": [null, null]}', "empty_document"),
        (b'{"texts": [null], "images": [null, "a.jpg"]}', "image_unplaced"),
        (b'{"texts": [null], "images": ["gone.jpg"]}', "image_missing"),
        (b'{"texts": [null], "images": [{"bytes": null, "path": null}]}', "image_missing"),
        (b'{"texts": [null], "images": [5]}', "image_missing"),
        (b'{"texts": [null], "images": [{"bytes": ""}]}', "image_empty"),
        (b'{"texts": [null], "images": [{"bytes": "?!"}]}', "image_undecodable"),
        (b'{"texts": [null], "images": ["a\\u0000b"]}', "image_outside"),
        (b"[" * 100_000, "broken_json"),
    ],
)
def test_a_bad_record_is_rejected_and_its_neighbours_are_read(tmp_path, line, expected):
    good = b'{"texts": ["good"]}'
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good, line, good]))
    shard = open_records(tmp_path / "x.jsonl")
    assert reason(shard, 1) == expected
    assert shard.read(0)[0].parts == shard.read(2)[0].parts == [Text("good")]


@pytest.mark.parametrize(
    "path", ["../secret.jpg", "a/../../secret.jpg", "/etc/hostname", "..", "a/../../x/../../secret.jpg"]
)
def test_a_path_does_not_leave_the_folder_of_the_records(tmp_path, path):
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (tmp_path / "in").mkdir()
    shard = open_lines(tmp_path / "in", {"texts": ["one", None], "images": [None, path]})
    assert [reject.reason for reject in shard.read(0)[1]] == ["image_outside"]


def test_paths_below_the_folder_of_the_records_are_read_however_they_are_written(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(jpeg(20, 30))
    paths = [
        "a/1.jpg",
        "./a/1.jpg",
        "a/x/../1.jpg",
        str(tmp_path / "a/1.jpg"),
        {"path": "a/1.jpg"},
        {"bytes": None, "path": "a/1.jpg"},
    ]
    shard = open_lines(tmp_path, {"texts": [None] * 6, "images": paths})
    document, lost = shard.read(0)
    assert [shard.load(part) for part in document.parts] == [jpeg(20, 30)] * 6 and not lost


@pytest.mark.parametrize("before", ["data:image/jpeg;base64,", ""])
def test_an_image_may_be_written_in_place_of_its_address(tmp_path, before):
    images = [before + base64.b64encode(jpeg()).decode()]
    shard = open_lines(tmp_path, {"texts": [None], "images": images})
    assert shard.load(shard.read(0)[0].parts[0]) == jpeg()


@pytest.mark.parametrize("name", ["x.json", "x.arrow"])
def test_a_record_file_that_ends_early_gives_its_whole_records(tmp_path, name):
    WRITERS[name](tmp_path / name, RECORDS)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * 0.75)])
    shard = open_records(tmp_path / name)
    assert [reject.reason for reject in shard.rejects] == ["shard_truncated"]
    assert 3 <= len(shard) < 7
    assert [shard.read(index)[0].parts[2] for index in range(len(shard))] == [
        Text(f"two {n}") for n in range(len(shard))
    ]


def test_what_stands_behind_the_end_of_a_json_list_is_told(tmp_path):
    one = json.dumps([{"texts": ["a"], "images": [None]}] * 2)
    for text, rejects in ((one + "\n \n", []), (f"{one}\n{one}\n", ["shard_damaged"])):
        (tmp_path / "x.json").write_text(text)
        shard = open_records(tmp_path / "x.json")
        assert len(shard) == 2 and [reject.reason for reject in shard.rejects] == rejects


def test_what_stands_behind_the_end_of_an_arrow_stream_is_told(tmp_path):
    write_stream(tmp_path / "x.arrow", RECORDS)
    one = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "x.arrow").write_bytes(one * 2)
    shard = open_records(tmp_path / "x.arrow")
    assert len(shard) == len(RECORDS) and [reject.reason for reject in shard.rejects] == ["shard_damaged"]


def test_an_arrow_file_with_two_columns_of_one_name_is_unreadable(tmp_path):
    table = pa.table([["a"], ["b"]], ["texts", "texts"])
    with pa.ipc.new_stream(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(Rejected, match="two columns of one name"):
        open_records(tmp_path / "x.arrow")


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_table_is_known_by_its_name_where_its_first_bytes_are_gone(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(Rejected, match="cannot be read"):
        open_records(tmp_path / name)
    write_parquet(tmp_path / "x.parquet", RECORDS)
    damaged = b"PBR1" + (tmp_path / "x.parquet").read_bytes()[4:]
    (tmp_path / "x.parquet").write_bytes(damaged)
    assert len(open_records(tmp_path / "x.parquet")) == len(RECORDS)


def test_a_truncated_parquet_file_is_unreadable(tmp_path):
    write_parquet(tmp_path / "x.parquet", RECORDS)
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-100])
    with pytest.raises(Rejected) as error:
        open_records(tmp_path / "x.parquet")
    assert error.value.reason == "shard_unreadable"


def damage_row_group(path: Path) -> None:
    """The second row group's page of its second column cannot be decoded."""
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    content[column.data_page_offset : column.data_page_offset + 30] = b"\xff" * 30
    path.write_bytes(content)


def test_a_row_group_that_is_damaged_costs_its_own_records(tmp_path):
    write_parquet(tmp_path / "x.parquet", RECORDS)
    damage_row_group(tmp_path / "x.parquet")
    shard = open_records(tmp_path / "x.parquet")
    assert [reason(shard, index) for index in (3, 4, 5)] == ["shard_unreadable"] * 3
    assert all(shard.read(index)[0].parts for index in (0, 1, 2, 6))


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_cut_while_it_is_read_rejects_and_does_not_crash(tmp_path, name):
    records = [
        {**record, "texts": [*record["texts"], "x" * 9000], "images": [*record["images"], None]}
        for record in RECORDS
    ]
    WRITERS[name](tmp_path / name, records)
    shard = open_records(tmp_path / name)
    os.truncate(tmp_path / name, 100)  # the kernel leaves the rest of the page that the file ends in
    assert reason(shard, 6) in ("shard_truncated", "shard_unreadable")


@pytest.mark.parametrize("name", ["x.arrow", "x.feather"])
def test_offsets_that_lead_astray_cost_their_own_batch_and_not_the_process(tmp_path, name):
    WRITERS[name](tmp_path / name, RECORDS)
    content = (tmp_path / name).read_bytes()
    texts = struct.pack("<4i", 0, 3, 6, 9)  # of the first three records
    (tmp_path / name).write_bytes(content.replace(texts, struct.pack("<4i", 0, 3, 1 << 30, 9), 1))
    shard = open_records(tmp_path / name)
    assert [reason(shard, index) for index in (0, 1, 2)] == ["shard_unreadable"] * 3
    assert [shard.read(index)[0].key for index in (3, 4, 5, 6)] == ["3", "4", "5", "6"]


def test_text_in_arrow_that_is_not_utf8_costs_its_record(tmp_path):
    write_stream(tmp_path / "x.arrow", RECORDS)
    content = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "x.arrow").write_bytes(content.replace(b"two 1", b"two \xff"))
    shard = open_records(tmp_path / "x.arrow")
    assert reason(shard, 1) == "broken_utf8" and shard.read(0)[0].key == "0"


def test_a_parquet_file_that_counts_its_rows_wrongly_is_unreadable(tmp_path):
    write_parquet(tmp_path / "x.parquet", RECORDS)
    content = (tmp_path / "x.parquet").read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    # Thrift: the next field, of 64 bits; 3 rows as 6, -4 as 7.
    (tmp_path / "x.parquet").write_bytes(
        content[:footer] + content[footer:].replace(b"\x16\x06", b"\x16\x07")
    )
    with pytest.raises(Rejected) as error:
        open_records(tmp_path / "x.parquet")
    assert error.value.reason == "shard_unreadable"


def test_what_hugging_face_datasets_saves_is_read(tmp_path):
    import datasets

    features = datasets.Features(
        {"texts": datasets.List(datasets.Value("string")), "images": datasets.List(datasets.Image())}
    )
    datasets.Dataset.from_list(RECORDS, features=features).save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    shard = open_records(arrow)
    assert shard.load(shard.read(4)[0].parts[1]) == jpeg(24, 30)


@pytest.mark.parametrize("name", ["text", "content"])
def test_text_of_json_lines(tmp_path, name):
    shard = open_lines(tmp_path, {name: "Hello"}, {name: 5}, {name: " "}, format="text")
    assert shard.read(0)[0].parts == [Text("Hello")]
    assert (reason(shard, 1), reason(shard, 2)) == ("wrong_shape", "empty_document")


@pytest.mark.parametrize("name, head", [("x.txt", b""), ("X.TXT", b""), ("X.TSV", b"text\n")])
def test_text_of_plain_files_is_a_document_a_line(tmp_path, name, head):
    (tmp_path / name).write_bytes(head + b"one\r\n\n  \ntwo\ncaf\xe9\nthree")
    shard = open_records(tmp_path / name, "text")
    assert [shard.read(index)[0].parts for index in (0, 1, 3)] == [
        [Text("one")],
        [Text("two")],
        [Text("three")],
    ]
    assert reason(shard, 2) == "broken_utf8"


def test_text_of_tars_and_tables(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        [("a.txt", b"one"), ("b.json", b'{"text": "two"}'), ("c.json", b"[]"), ("d.jpg", b"")],
    )
    shard = open_records(tmp_path / "x.tar", "text")
    assert [shard.read(index)[0].parts for index in (0, 1)] == [[Text("one")], [Text("two")]]
    assert (reason(shard, 2), reason(shard, 3)) == ("wrong_shape", "wrong_shape")
    pq.write_table(pa.table({"text": ["one", "two"], "other": [1, 2]}), tmp_path / "x.parquet")
    assert open_records(tmp_path / "x.parquet", "text").read(1)[0].parts == [Text("two")]
