"""The small parts of data preparation: reading inputs, cutting them, telling duplicates, journals, accounts."""

import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.dedup import find_repeated, url_hash
from experiments.vlm.prepare.download.journal import Journal
from experiments.vlm.prepare.folder import Folder, appearing, read_array, write_array
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.pictures import Encoding, finish, looks_whole, shrunk
from experiments.vlm.prepare.plan import cut, make_plan
from experiments.vlm.prepare.progress import Shown
from experiments.vlm.prepare.records import KINDS, Sources
from experiments.vlm.prepare.records.record import Picture, Reference
from experiments.vlm.prepare.rows import read_rows
from experiments.vlm.prepare.tally import Tally, add_reports
from tests.faults.hostile_server import image
from torchtitan.config.errors import ConfigError

RECORDS = [{"url": f"http://a/{number}", "caption": f"ä{number}"} for number in range(23)]


def write(path, form: str):
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    pairs = [f"{record['url']}\t{record['caption']}" for record in RECORDS]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=7)
    elif form == "json.gz":
        path.write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
    else:
        text = {
            "jsonl": "\n\n".join(lines),  # blank lines, and none at the end
            "jsonl.gz": "\n".join(lines),
            "json": json.dumps(RECORDS, indent=1),
            "tsv": "url\tcaption\n" + "\n".join(pairs) + "\n",
            "bare.tsv": "\r\n".join(pairs),
            "tsv.gz": "\n".join(pairs),
        }[form]
        path.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
    return path


@pytest.mark.parametrize("form", ["parquet", "jsonl", "json", "tsv", "bare.tsv", "jsonl.gz", "json.gz", "tsv.gz"])
@pytest.mark.parametrize("rows", [1, 5, 23, 100])
def test_every_record_is_in_one_piece_whatever_the_file(tmp_path, form, rows):
    source = write(tmp_path / f"x.{form}", form)
    plan = make_plan(Options(str(source), str(tmp_path / "out"), records_per_shard=rows), Folder(tmp_path / "out"))
    pieces = [list(read_rows(piece)) for piece in plan.pieces]
    assert [row for piece in pieces for row in piece] == RECORDS
    assert all(len(piece) == rows for piece in pieces[:-1]) and plan.records == len(RECORDS) and plan.kind == "captions"


def test_rows_that_cannot_be_read_are_rejected_in_their_place(tmp_path):
    good = b'{"url": "http://a", "caption": "b"}\n'
    (tmp_path / "x.jsonl").write_bytes(good + b"\xff\xfe\n" + b"{oops\n" + b"[1]\n" + good)
    (piece,) = cut(tmp_path / "x.jsonl", 10)
    reasons = [row.reason if isinstance(row, Rejected) else "good" for row in read_rows(piece)]
    assert reasons == ["good", "broken_utf8", "broken_json", "wrong_shape", "good"]

    (tmp_path / "x.tsv").write_text("http://a\tb\nhttp://a\tb\tc\n")
    (piece,) = cut(tmp_path / "x.tsv", 10)
    assert [isinstance(row, Rejected) for row in read_rows(piece)] == [False, True]


def test_broken_text_in_parquet_costs_its_row(tmp_path):
    captions = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"url": ["http://a"] * 3, "caption": captions}), tmp_path / "x.parquet")
    (piece,) = cut(tmp_path / "x.parquet", 10)
    assert [row.reason if isinstance(row, Rejected) else row["caption"] for row in read_rows(piece)] == ["a", "broken_utf8", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no record"), ('{"a": 1}\n', "fit none of"), ('{"texts": [], "images": []}\n', None)],
)
def test_inputs_that_say_nothing_are_refused(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    options = Options(str(tmp_path / "x.jsonl"), str(tmp_path / "out"))
    if message is None:
        assert make_plan(options, Folder(tmp_path / "out")).kind == "documents"
    else:
        with pytest.raises(ConfigError, match=message):
            make_plan(options, Folder(tmp_path / "out"))


@pytest.mark.parametrize(
    ("option", "value"),
    [("concurrency", 0), ("retries", -1), ("quality", 101), ("allow_networks", ("10.0.0.1/8",)), ("image_folder", "/no/such")],
)
def test_wrong_options_are_named(option, value):
    with pytest.raises(ConfigError, match=option):
        Options("in", "out", **{option: value})


@pytest.mark.parametrize("pass_hashes", [1, 50, 10**6])
def test_repeated_is_what_came_before(pass_hashes):
    rng = random.Random(0)
    arrays = [np.array([rng.randrange(60) for _ in range(rng.randrange(40))], np.uint64) for _ in range(12)]
    arrays.append(np.array([2**64 - 1, 2**64 - 1, 0, 0], np.uint64))
    seen: set[int] = set()
    expected = []
    for array in arrays:
        expected.append([])
        for value in array.tolist():
            expected[-1].append(value in seen and value != 0)
            seen.add(value)
    assert [array.tolist() for array in find_repeated(arrays, pass_hashes)] == expected


def test_a_fragment_does_not_make_another_url():
    assert url_hash("http://a/b#c") == url_hash("http://a/b") != url_hash("http://a/c")
    assert url_hash("") == 0


def test_a_journal_survives_a_torn_line_and_lost_bytes(tmp_path):
    with Journal(tmp_path) as journal:
        journal.arrived("a", b"1" * 100)
        journal.failed("b", "http_404", "")
        journal.arrived("c", b"2" * 100)
    (lines,) = tmp_path.glob("*.jsonl")
    (data,) = tmp_path.glob("*.bin")
    with Journal(tmp_path) as journal:
        assert (journal.read("a"), journal.outcomes["b"].reason, journal.read("c")) == (b"1" * 100, "http_404", b"2" * 100)
        journal.arrived("d", b"3")
        assert journal.read("d") == b"3"
    lines.write_bytes(lines.read_bytes()[:-5])
    with Journal(tmp_path) as journal:
        assert set(journal.outcomes) == {"a", "b", "d"}
    data.write_bytes(data.read_bytes()[:50])
    with Journal(tmp_path) as journal:
        assert set(journal.outcomes) == {"b", "d"}


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), appearing(tmp_path / "x") as file:
        file.write(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("array", [np.arange(7, dtype=np.uint64) << 60, np.array([True, False, True]), np.zeros(0, np.uint64)])
def test_an_array_comes_back_as_it_was_written(tmp_path, array):
    write_array(tmp_path / "x.npy", array)
    read = read_array(tmp_path / "x.npy", array.dtype.type)
    assert np.array_equal(read, array) and read.dtype == array.dtype
    assert np.array_equal(np.load(tmp_path / "x.npy"), array), "any NumPy reads it"


def test_pictures_cut_anywhere_are_told(tmp_path):
    for form in ("JPEG", "PNG", "WEBP"):
        data = image(1, form)
        assert looks_whole(data) and finish(data, Encoding()).data == data
        for end in (len(data) // 2, len(data) * 9 // 10):
            assert not looks_whole(data[:end])
            with pytest.raises(Rejected):
                finish(data[:end], Encoding())
    assert looks_whole(b"<html>")
    assert not looks_whole(b"")


def test_a_side_never_vanishes():
    assert shrunk(1, 20000, 100) == (1, 100)
    assert shrunk(50, 100, 200) == (50, 100)
    thin = finish(image(0, "PNG"), Encoding(max_side=1))
    assert (thin.height, thin.width) == (1, 1)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("captions", {"url": "http://a", "caption": 3}),
        ("captions", {"url": 3, "caption": "a"}),
        ("captions", {"nothing": 1}),
        ("documents", {"texts": ["a"], "images": []}),
        ("documents", {"texts": [1], "images": [None]}),
        ("documents", {"texts": [None], "images": [7]}),
        ("conversations", {"conversations": []}),
        ("conversations", {"conversations": ["hi"]}),
    ],
)
def test_records_of_the_wrong_shape_are_rejected(kind, row):
    with pytest.raises(Rejected) as rejected:
        KINDS[kind].parse(row, Sources())
    assert rejected.value.reason == "wrong_shape"


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ({"type": "image", "image": "1.jpg"}, {"path": "1.jpg"}),
        ({"type": "image", "path": "1.jpg", "text": None}, {"path": "1.jpg"}),
        ({"type": "image", "url": "http://a/1"}, {"url": "http://a/1"}),
        ({"type": "image_url", "image_url": {"url": "http://a/1"}}, {"url": "http://a/1"}),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}, {"data": b"ABC"}),
        ({"type": "image", "image": {"bytes": "QUJD", "path": "1.jpg"}}, {"data": b"ABC"}),
    ],
)
def test_whatever_a_message_calls_its_image_it_goes_into_the_shard(item, named):
    turns = [{"role": "user", "content": [{"type": "image"}, item, {"type": "text", "text": "What?"}]}]
    record = KINDS["conversations"].parse({"messages": turns}, Sources(image_folder="images"))
    assert record.references == [Reference(**named)]
    members = KINDS["conversations"].members(record, "7", [Picture(b"ABC", "png", 1, 1, "")])
    content = json.loads(members["7.json"])["messages"][0]["content"]
    assert content[0] == {"type": "image"} and content[2] == turns[0]["content"][2]
    assert {name: content[1][name] for name in content[1] if name != "text"} == {"type": "image", "image": "7.0.png"}


def test_reports_add_up():
    tallies = [Tally() for _ in range(3)]
    for number, tally in enumerate(tallies):
        for index in range(10):
            tally.reject("images", f"{number}-{index}", "http_404" if index % 2 else "dns", "", "http://a")
            tally.keep("records", 5)
    total = add_reports(tally.report() for tally in tallies)
    assert total["images"] == {"read": 30, "written": 0, "rejected": {"dns": 15, "http_404": 15}}
    assert total["records"] == {"read": 30, "written": 30, "rejected": {}} and total["bytes"] == 150
    assert [example["key"] for example in total["examples"] if example["reason"] == "dns"] == ["0-0", "0-2", "0-4", "0-6", "0-8"]


def test_without_a_terminal_progress_is_plain_lines(capsys):
    shown = Shown()
    shown.stage("images", 10)
    shown.advance(4, before=True)
    shown.advance(6, failed=2, size=3_000_000)
    shown.close()
    said = capsys.readouterr().err
    assert said.startswith("images: 10 of 10, ") and "2 failed" in said and "MB/s" in said and "\r" not in said
