"""Bad samples cost themselves alone, and each is told once."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.vlm.data import formats, reject_log
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
        for path in (tmp_path / "out" / "rejects").glob("*.jsonl")
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


def some_rejects(start: int, end: int) -> list[Reject]:
    return [Reject("captions", "a.tar", str(key), "image_empty") for key in range(start, end)]


def keys_of(folder: Path) -> Counter:
    return Counter(
        json.loads(line)["key"] for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()
    )


def test_lines_are_parsed_once_however_often_a_run_goes_on(tmp_path, monkeypatch):
    """Nor do ranks look into each other's files while none can have met the same sample."""
    parsed, read = [], json.loads
    monkeypatch.setattr(reject_log.json, "loads", lambda line: parsed.append(line) or read(line))
    for rank in range(3):
        RejectLog(tmp_path, rank).write(some_rejects(100 * rank, 100 * rank + 100))
    opened = []
    monkeypatch.setattr(
        reject_log.Lines, "more", lambda lines, more=reject_log.Lines.more: opened.append(1) or more(lines)
    )
    log = RejectLog(tmp_path, 1)
    log.write(some_rejects(0, 310))
    for key in range(310, 320):
        log.write(some_rejects(key, key + 1), dealt_again=False)
    assert not parsed and len(opened) == 3 + 10
    assert keys_of(tmp_path) == Counter(map(str, range(320)))


@pytest.mark.parametrize("harm", ["deleted", "cut", "behind", "ahead"])
def test_an_index_that_does_not_match_its_lines_costs_none(tmp_path, harm):
    RejectLog(tmp_path, 0).write(some_rejects(0, 20))
    path, index = tmp_path / "0.jsonl", tmp_path / ".0.index"
    if harm == "deleted":
        index.unlink()
    elif harm == "ahead":  # the machine went down before the lines were on disk
        os.truncate(path, 250)
    else:
        os.truncate(index, 5 * 16 + (7 if harm == "cut" else 0))
    for _ in range(2):
        RejectLog(tmp_path, 0).write(some_rejects(0, 25))
        RejectLog(tmp_path, 1).write(some_rejects(0, 30))
    assert keys_of(tmp_path) == Counter(map(str, range(30)))


def test_two_splits_of_a_rank_share_its_file(tmp_path):
    train, held_out = RejectLog(tmp_path, 0), RejectLog(tmp_path, 0)
    for key in range(6):
        (train, held_out)[key % 2].write(some_rejects(key, key + 2), dealt_again=False)
    RejectLog(tmp_path, 0).write(some_rejects(0, 9))
    assert keys_of(tmp_path) == Counter(map(str, range(9)))


def test_many_identities_are_known_in_little_memory(monkeypatch):
    monkeypatch.setattr(reject_log, "RECENT", 10)
    known, numbers = reject_log.Identities(), [3**key % 2**64 for key in range(100)]
    for number in numbers[::2]:
        known.add([number])
    assert [number in known for number in numbers] == [True, False] * 50
    assert len(known._recent) <= 10


def test_the_first_of_a_kind_in_a_shard_is_logged(tmp_path, caplog):
    log = RejectLog(tmp_path / "rejects", 0)
    log.write([Reject("captions", "a.tar", str(key), "image_empty") for key in range(5)])
    log.write(
        [Reject("captions", "a.tar", "5", "image_missing"), Reject("captions", "b.tar", "0", "image_empty")]
    )
    assert len(caplog.messages) == 3 and "shard a.tar, sample 0: the image has no bytes" in caplog.messages[0]
