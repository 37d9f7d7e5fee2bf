"""Bad samples cost themselves alone, and each is told once."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.vlm.data import formats
from experiments.vlm.data import report as report_of_data
from experiments.vlm.data.formats import text
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.reject_log import RejectLog
from experiments.vlm.data.rejects import Reject
from tests.bad_samples import mixed_job, read_all, write_mixed
from tests.tiny_data import Characters, make_job, write_all, write_captions
from torchtitan.config.errors import DataError


def check_everything_is_accounted_for(
    folder: Path, dump: Path, good: set[str], bad: dict[str, str], **options
) -> None:
    seen, report, lines = read_all(mixed_job(folder, dump, **options))
    assert seen == Counter(good)
    samples = {line["key"]: line["reason"] for line in lines if "image" not in line}
    assert samples == bad and len(lines) == len({(line["key"], line.get("image")) for line in lines})
    told = Counter(
        {reason: entry["count"] for reason, entry in report["captions"]["rejected"]["samples"].items()}
    )
    assert told == Counter(bad.values())
    assert report["captions"]["counts"]["samples"] == len(good)
    assert {line["key"] for line in lines if line.get("reason") == "image_unplaced"} <= good


def test_a_tenth_of_bad_samples_costs_no_good_one(tmp_path):
    good, bad = write_mixed(tmp_path / "mixed", count=200, shards=3)
    check_everything_is_accounted_for(tmp_path / "mixed", tmp_path / "out", good, bad)


@pytest.mark.slow
def test_ten_thousand_samples_with_a_tenth_bad(tmp_path):
    good, bad = write_mixed(tmp_path / "mixed", count=10_000, shards=8)
    check_everything_is_accounted_for(
        tmp_path / "mixed", tmp_path / "out", good, bad, num_workers=2, seq_len=1024, patches_per_row=1024
    )


def test_a_truncated_tar_gives_what_is_whole(tmp_path):
    keys = write_captions(tmp_path / "captions", shards=2)
    shard = tmp_path / "captions" / "captions-1.tar"
    os.truncate(shard, os.path.getsize(shard) // 2 + 100)
    seen, report, lines = read_all(mixed_job(tmp_path / "captions", tmp_path / "out"))
    assert set(seen.values()) == {1} and set(keys[:20]) < set(seen) < set(keys)
    assert report["captions"]["rejected"]["shards"]["shard_truncated"]["count"] == 1
    assert [line["shard"] for line in lines if line["reason"] == "shard_truncated"] == [str(shard)]


def test_a_missing_shard_is_told_and_the_others_are_read(tmp_path):
    keys = write_captions(tmp_path / "captions", shards=3)
    (tmp_path / "captions" / "captions-1.tar").unlink()
    job = mixed_job(tmp_path / "captions", tmp_path / "out", global_batch_size=4)
    job.data.sources[0].path = str(tmp_path / "captions" / "captions-{0..2}.tar")
    seen, report, lines = read_all(job)
    assert seen == Counter(key for key in keys if not key.startswith("1-"))
    assert report["captions"]["rejected"] == {
        "shards": {
            "shard_missing": {
                "count": 1,
                "examples": report["captions"]["rejected"]["shards"]["shard_missing"]["examples"],
            }
        }
    }
    assert len(lines) == 1


def test_what_was_rejected_is_told_in_a_line_by_source(tmp_path):
    _, bad = write_mixed(tmp_path / "mixed", count=200, shards=3)
    job = mixed_job(tmp_path / "mixed", tmp_path / "out")
    loader = Loader(job, Characters())
    for _ in loader:
        pass
    report = loader.report()
    loader.close()
    assert len(bad) == 20 and loader.summary({"sources": {}}) == ""
    line = loader.summary(report)
    assert line.startswith("rejected: captions 20 of 200 samples (") and line.endswith(
        " images (image_unplaced 40); see rejects/"
    )
    assert all(f"{reason} {count}" in line for reason, count in Counter(bad.values()).items())
    cut = {"text": {"counts": {"read": 2400}, "rejected": {"shards": {"shard_missing": {"count": 1}}}}}
    assert loader.summary({"sources": cut}) == "rejected: text 1 shard (shard_missing 1); see rejects/"


def test_a_fault_of_the_reader_is_no_fault_of_the_data(tmp_path, monkeypatch, caplog):
    def failing(record):
        return {}["typo"] if "7" in record["text"] else text.parse(record)

    monkeypatch.setitem(formats.FORMATS, "text", replace(formats.FORMATS["text"], parse=failing))
    write_all(tmp_path / "data")
    job = make_job(tmp_path / "data", tmp_path / "out", epochs=1)
    (job.data.sources[2].path, job.data.sources) = str(tmp_path / "data" / "texts"), job.data.sources[2:]
    lines = [json.dumps({"text": f"text {number}"}) for number in range(30)]
    (tmp_path / "data" / "texts" / "texts.jsonl").write_text("\n".join(lines))
    seen, report, _ = read_all(job)
    failed = report["texts"]["rejected"]["samples"]
    assert list(failed) == ["reader_failed"] and failed["reader_failed"]["count"] == 3 and len(seen) == 27
    assert "KeyError in failing, test_bad_data.py" in failed["reader_failed"]["examples"][0]["detail"]
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert len(tracebacks) == 1 and "'typo'" in caplog.text

    monkeypatch.setattr(report_of_data, "JUDGED_FROM", 10)
    job.data.max_bad_fraction = 0.05
    with pytest.raises(DataError, match="most of them: the reader failed"):
        list(Loader(job, Characters()))


def test_rejects_are_written_once_over_epochs_kills_and_ranks(tmp_path):
    _, bad = write_mixed(tmp_path / "mixed", count=60, shards=2)
    for ranks in (1, 2, 1):
        for rank in range(ranks):
            job = mixed_job(tmp_path / "mixed", tmp_path / "out", global_batch_size=4, local_batch_size=2)
            job.data.epochs = 2
            loader = Loader(job, Characters(), rank=rank, ranks=ranks, agree=lambda has_data: has_data)
            for _ in loader:
                pass
            loader.close()
    lines = [
        json.loads(line)
        for path in (tmp_path / "out" / "rejects").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert Counter(line["key"] for line in lines if "image" not in line) == Counter(list(bad))


def test_a_line_that_a_kill_cut_short_is_written_again(tmp_path):
    rejects = [
        Reject("captions", "a.tar", str(key), "image_empty", image=key % 2 or None) for key in range(4)
    ]
    RejectLog(tmp_path / "rejects", 0).write(rejects[:3])
    path = tmp_path / "rejects" / "0.jsonl"
    os.truncate(path, os.path.getsize(path) - 10)
    RejectLog(tmp_path / "rejects", 0).write(rejects)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["0", "1", "2", "3"]


def test_the_first_of_a_kind_in_a_shard_is_logged(tmp_path, caplog):
    log = RejectLog(tmp_path / "rejects", 0)
    log.write([Reject("captions", "a.tar", str(key), "image_empty") for key in range(5)])
    log.write(
        [Reject("captions", "a.tar", "5", "image_missing"), Reject("captions", "b.tar", "0", "image_empty")]
    )
    assert len(caplog.messages) == 3 and "shard a.tar, sample 0: the image has no bytes" in caplog.messages[0]
