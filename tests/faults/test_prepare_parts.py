"""The small parts of data preparation: reading inputs, cutting them, telling duplicates, journals, accounts."""

import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.vlm.data.document import Document, Image
from experiments.vlm.data.formats import KINDS
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.dedup import find_repeated, url_hash
from experiments.vlm.prepare.folder import Folder, appearing, read_array, write_array
from experiments.vlm.prepare.images import Encoding, FinishedImage, finish_image, looks_whole, shrunk
from experiments.vlm.prepare.journal import Journal
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.progress import Shown
from experiments.vlm.prepare.records import MEMBERS
from experiments.vlm.prepare.shard_plan import Job, make_plan
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
    job = Job.begin(Options(str(source), str(tmp_path / "out"), records_per_shard=rows))
    pieces = [[record for _, record in job.records(number)] for number in range(job.shards)]
    assert [parsed.record for piece in pieces for parsed in piece] == RECORDS
    assert all(len(piece) == rows for piece in pieces[:-1])
    assert (job.plan.records, job.plan.format) == (len(RECORDS), "captions")


def reasons(tmp_path, name: str, format: str = "auto") -> list[str]:
    job = Job.begin(Options(str(tmp_path / name), str(tmp_path / "out" / name), format=format))
    return [record.reason if isinstance(record, Rejected) else "good" for _, record in job.records(0)]


def test_records_that_cannot_be_read_are_rejected_in_their_place(tmp_path):
    good = b'{"url": "http://a", "caption": "b"}\n'
    (tmp_path / "x.jsonl").write_bytes(good + b"\xff\xfe\n" + b"{oops\n" + b"[1]\n" + good)
    assert reasons(tmp_path, "x.jsonl") == ["good", "broken_utf8", "broken_json", "wrong_shape", "good"]
    (tmp_path / "x.tsv").write_text("http://a\tb\nhttp://a\tb\tc\n")
    assert reasons(tmp_path, "x.tsv") == ["good", "wrong_shape"]


def test_broken_text_in_parquet_costs_its_record(tmp_path):
    captions = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"url": ["http://a"] * 3, "caption": captions}), tmp_path / "x.parquet")
    assert reasons(tmp_path, "x.parquet") == ["good", "broken_utf8", "good"]


@pytest.mark.parametrize(
    ("option", "message"), [("image_column", "--image_column link is not among the columns url"), ("input", "holds|cannot be read")]
)
def test_a_column_or_a_file_that_is_not_there_is_named(tmp_path, option, message):
    (tmp_path / "x.jsonl").write_text('{"url": "http://a", "caption": "b"}')
    (tmp_path / "x.parquet").write_text("PAR1 and no more")
    changed = {"image_column": "link"} if option == "image_column" else {"input": str(tmp_path / "x.parquet")}
    with pytest.raises(ConfigError, match=message):
        Job.begin(Options(**{"input": str(tmp_path / "x.jsonl"), "out": str(tmp_path / "out")} | changed))


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no record"), ('{"a": 1}\n', "fit none of"), ('{"texts": [], "images": []}\n', None)],
)
def test_inputs_that_say_nothing_are_refused(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    options = Options(str(tmp_path / "x.jsonl"), str(tmp_path / "out"))
    if message is None:
        assert make_plan(options, Folder(tmp_path / "out")).format == "obelics"
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
        assert looks_whole(data) and finish_image(data, Encoding()).data == data
        for end in (len(data) // 2, len(data) * 9 // 10):
            assert not looks_whole(data[:end])
            with pytest.raises(Rejected):
                finish_image(data[:end], Encoding())
    assert looks_whole(b"<html>")
    assert not looks_whole(b"")


def test_a_side_never_vanishes():
    assert shrunk(1, 20000, 100) == (1, 100)
    assert shrunk(50, 100, 200) == (50, 100)
    thin = finish_image(image(0, "PNG"), Encoding(max_side=1))
    assert (thin.height, thin.width) == (1, 1)


@pytest.mark.parametrize(
    ("item", "place"),
    [
        ({"type": "image", "image": "1.jpg"}, "content"),
        ({"type": "image", "path": "1.jpg", "text": None}, "content"),
        ({"type": "image", "url": "http://a/1"}, "content"),
        ({"type": "image_url", "image_url": {"url": "http://a/1"}}, "content"),
        ({"type": "image", "image": {"bytes": "QUJD", "path": "1.jpg"}}, "content"),
        ({"type": "image"}, "images"),
        ({"type": "image", "index": 1}, "images"),
    ],
)
def test_whatever_a_message_calls_its_image_it_is_named_in_the_shard(item, place):
    turns = [{"role": "user", "content": [item, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "Noise."}]
    record = {"id": 7, "messages": turns, "images": ["1.jpg", b"2"]}
    finished = FinishedImage(b"ABC", "png", 1, 1, "")
    (value,) = KINDS["messages"].parse(record).images()
    members = MEMBERS["messages"](record, Document("7", [Image((value, finished), 1, 1)]), "7")
    assert members["7.0.png"] == b"ABC"
    told = json.loads(members["7.json"])
    named, rest = told["messages"][0]["content"]
    assert (told["id"], rest, told["messages"][1]) == (7, turns[0]["content"][1], turns[1])
    if place == "content":
        assert {name: named[name] for name in named if name != "text"} == {"type": "image", "image": "7.0.png"}
    else:
        assert named == item and told["images"][item.get("index", 0)] == "7.0.png"


def test_without_a_terminal_progress_is_plain_lines(capsys):
    shown = Shown()
    shown.stage("images", 10)
    shown.advance(4, before=True)
    shown.advance(6, failed=2, size=3_000_000)
    shown.close()
    said = capsys.readouterr().err
    assert said.startswith("images: 10 of 10, ") and "2 failed" in said and "MB/s" in said and "\r" not in said
