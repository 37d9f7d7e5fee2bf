"""Inputs of every kind are cut into pieces without loss; what cannot be read is told before any fetching."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.folder import Folder
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.shard_plan import PrepareJob, make_plan
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


@pytest.mark.parametrize(
    "form", ["parquet", "jsonl", "json", "tsv", "bare.tsv", "jsonl.gz", "json.gz", "tsv.gz"]
)
@pytest.mark.parametrize("rows", [1, 5, 23, 100])
def test_every_record_is_in_one_piece_whatever_the_file(tmp_path, form, rows):
    source = write(tmp_path / f"x.{form}", form)
    job = PrepareJob.begin(Options(str(source), str(tmp_path / "out"), records_per_shard=rows))
    pieces = [[record for _, record in job.records(number)] for number in range(job.shards)]
    assert [parsed.record for piece in pieces for parsed in piece] == RECORDS
    assert all(len(piece) == rows for piece in pieces[:-1])
    assert (job.plan.records, job.plan.format) == (len(RECORDS), "captions")


def reasons(tmp_path, name: str, format: str = "auto") -> list[str]:
    job = PrepareJob.begin(Options(str(tmp_path / name), str(tmp_path / "out" / name), format=format))
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
    ("option", "message"),
    [("image_column", "--image_column link is not among the columns url"), ("input", "holds|cannot be read")],
)
def test_a_column_or_a_file_that_is_not_there_is_named(tmp_path, option, message):
    (tmp_path / "x.jsonl").write_text('{"url": "http://a", "caption": "b"}')
    (tmp_path / "x.parquet").write_text("PAR1 and no more")
    changed = {"image_column": "link"} if option == "image_column" else {"input": str(tmp_path / "x.parquet")}
    with pytest.raises(ConfigError, match=message):
        PrepareJob.begin(
            Options(**{"input": str(tmp_path / "x.jsonl"), "out": str(tmp_path / "out")} | changed)
        )


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
    [
        ("concurrency", 0),
        ("retries", -1),
        ("quality", 101),
        ("allow_networks", ("10.0.0.1/8",)),
        ("image_folder", "/no/such"),
    ],
)
def test_wrong_options_are_named(option, value):
    with pytest.raises(ConfigError, match=option):
        Options("in", "out", **{option: value})
