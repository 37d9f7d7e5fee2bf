"""Bad samples cost themselves alone, and each is told once."""

import json
import os
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.vlm.data import formats, tally
from experiments.vlm.data.formats import text
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.reject_log import RejectLog
from experiments.vlm.data.tally import Reject
from tests.samples import encoded, jpeg, noise, write_tar
from tests.tiny_data import Characters, make_job, write_all, write_captions
from torchtitan.config.errors import DataError

Members = list[tuple[str, bytes]]


def caption(image: bytes, extension: str = "jpg") -> Callable[[str], Members]:
    return lambda key: [(f"{key}.{extension}", image), (f"{key}.txt", f"caption {key}".encode())]


def record(**content) -> Callable[[str], Members]:
    return lambda key: [(f"{key}.json", json.dumps(content).encode())]


@cache
def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels, or so its header says."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


@cache
def kinds_of_bad() -> dict[str, tuple[str, Callable[[str], Members]]]:
    """What is wrong: the reason that is told, and a sample of it."""
    return {
        "cut short": ("image_truncated", caption(jpeg(90, 90)[:900])),
        "zero bytes": ("image_empty", caption(b"")),
        "no image": ("image_undecodable", caption(b"these are no pixels")),
        "bomb": ("image_too_large", caption(bomb(), "png")),
        "no caption": ("caption_missing", lambda key: [(f"{key}.jpg", jpeg())]),
        "no image member": ("image_missing", lambda key: [(f"{key}.txt", b"a caption")]),
        "broken utf-8": ("broken_utf8", lambda key: [(f"{key}.jpg", jpeg()), (f"{key}.txt", b"\xff\xfe")]),
        "broken json": ("broken_json", lambda key: [(f"{key}.jpg", jpeg()), (f"{key}.json", b'{"caption": ')]),
        "json of another shape": ("wrong_shape", record(texts=3, images=[None])),
        "empty document": ("empty_document", record(texts=[], images=[])),
    }


@cache
def kinds_of_good() -> dict[str, Callable[[str], Members]]:
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [Image.fromarray(noise(40, 40, seed=seed)) for seed in range(3)]
    palette = Image.fromarray(noise(40, 40)).quantize(16)
    return {
        "plain": caption(jpeg(80, 40)),
        "wrong extension": caption(encoded(noise(40, 40), "PNG"), "jpg"),
        "cmyk": caption(encoded(Image.fromarray(noise(40, 40)).convert("CMYK"))),
        "16 bits": caption(encoded(noise(40, 40, 1)[..., 0].astype(np.uint16) * 257, "PNG"), "png"),
        "transparent palette": caption(encoded(palette, "PNG", transparency=3), "png"),
        "animated gif": caption(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "gif"),
        "animated webp": caption(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "webp"),
        "turned": caption(encoded(Image.fromarray(noise(40, 80)), exif=turned)),
        "1 x 20000": caption(encoded(noise(1, 20_000), "PNG"), "png"),
        "too many images": record(texts=["before", None], images=[None, None, "0.jpg", "1.jpg"]),
    }


def write_mixed(folder: Path, count: int, shards: int) -> tuple[set[str], dict[str, str]]:
    """Tars in which every tenth sample is bad, of all kinds in turn: the keys of the good ones; of the bad, with the reason."""
    good, bad = set(), {}
    goods, bads = list(kinds_of_good().values()), list(kinds_of_bad().values())
    folder.mkdir(parents=True)
    for shard in range(shards):
        members: Members = []
        for number in range(shard * count // shards, (shard + 1) * count // shards):
            key = f"{number:05d}"
            if number % 10 == 3:
                bad[key], make = bads[number // 10 % len(bads)]
            else:
                make = goods[number % len(goods)]
                good.add(key)
            members += make(key)
        write_tar(folder / f"mixed-{shard:02d}.tar", members)
    return good, bad


def read_all(job) -> tuple[Counter, dict, list[dict]]:
    """One epoch: how often each key was delivered, the report, and the lines of the reject file."""
    loader = Loader(job, Characters())
    seen = Counter(s.key for step in loader for batch in step.batches for s in batch.samples if s.piece == 0)
    report = loader.report()["sources"]
    loader.close()
    path = Path(job.job.dump_folder) / "rejects" / "0.jsonl"
    return seen, report, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mixed_job(folder: Path, dump: Path, **options):
    job = make_job(folder, dump, epochs=1, **options)
    job.data.sources = job.data.sources[:1]
    job.data.sources[0].path = str(folder)
    return job


def check_everything_is_accounted_for(folder: Path, dump: Path, good: set[str], bad: dict[str, str], **options) -> None:
    seen, report, lines = read_all(mixed_job(folder, dump, **options))
    assert seen == Counter(good)
    samples = {line["key"]: line["reason"] for line in lines if "image" not in line}
    assert samples == bad and len(lines) == len({(line["key"], line.get("image")) for line in lines})
    told = Counter({reason: entry["count"] for reason, entry in report["captions"]["rejected"]["samples"].items()})
    assert told == Counter(bad.values())
    assert report["captions"]["counts"]["samples"] == len(good)
    assert {line["key"] for line in lines if line.get("reason") == "image_unplaced"} <= good


def test_a_tenth_of_bad_samples_costs_no_good_one(tmp_path):
    good, bad = write_mixed(tmp_path / "mixed", count=200, shards=3)
    check_everything_is_accounted_for(tmp_path / "mixed", tmp_path / "out", good, bad)


@pytest.mark.slow
def test_ten_thousand_samples_with_a_tenth_bad(tmp_path):
    good, bad = write_mixed(tmp_path / "mixed", count=10_000, shards=8)
    check_everything_is_accounted_for(tmp_path / "mixed", tmp_path / "out", good, bad, num_workers=2, seq_len=1024, patches_per_row=1024)


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
        "shards": {"shard_missing": {"count": 1, "examples": report["captions"]["rejected"]["shards"]["shard_missing"]["examples"]}}
    }
    assert len(lines) == 1


def test_a_source_that_vanishes_leaves_the_others(tmp_path):
    folder = write_all(tmp_path / "data")
    job = make_job(folder, tmp_path / "out")
    loader = Loader(job, Characters())
    next(loader)
    state = loader.state_dict()
    loader.close()
    shutil.rmtree(folder / "captions")
    job.data.sources[0].path = str(folder / "captions" / "captions-{0..2}.tar")
    loader = Loader(job, Characters())
    loader.load_state_dict(state)
    sources = {sample.source for _ in range(20) for sample in next(loader).batches[0].samples}
    assert sources == {"documents", "texts"}
    loader.close()


@pytest.mark.parametrize(
    ("epochs", "message"), [(0, "no source has a good sample left: captions"), (1, "no source has a good sample: captions")]
)
def test_no_good_sample_at_all_is_an_error(tmp_path, epochs, message):
    (tmp_path / "rotten").mkdir()
    write_tar(tmp_path / "rotten" / "a.tar", caption(b"no image")("1"))
    job = mixed_job(tmp_path / "rotten", tmp_path / "out")
    job.data.epochs = epochs
    with pytest.raises(DataError, match=message):
        list(Loader(job, Characters()))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rotten_source_stops_the_run_when_asked_to(tmp_path, workers):
    (tmp_path / "rotten").mkdir()
    members = [member for n in range(1500) for member in caption(b"no image" if n % 3 else jpeg())(f"{n:04d}")]
    write_tar(tmp_path / "rotten" / "a.tar", members)
    job = mixed_job(tmp_path / "rotten", tmp_path / "out", max_bad_fraction=0.7, num_workers=workers)
    if workers == 0:
        assert sum(1 for _ in Loader(job, Characters())) > 10
    job.data.max_bad_fraction = 0.5
    with pytest.raises(DataError, match=r"source captions: \d+ of \d+ samples are bad \(6\d.\d%\), more than data.max_bad_fraction = 0.5"):
        for _ in Loader(job, Characters()):
            pass


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

    monkeypatch.setattr(tally, "JUDGED_FROM", 10)
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
    lines = [json.loads(line) for path in (tmp_path / "out" / "rejects").iterdir() for line in path.read_text().splitlines()]
    assert Counter(line["key"] for line in lines if "image" not in line) == Counter(list(bad))


def test_a_line_that_a_kill_cut_short_is_written_again(tmp_path):
    rejects = [Reject("captions", "a.tar", str(key), "image_empty", image=key % 2 or None) for key in range(4)]
    RejectLog(tmp_path / "rejects", 0).write(rejects[:3])
    path = tmp_path / "rejects" / "0.jsonl"
    os.truncate(path, os.path.getsize(path) - 10)
    RejectLog(tmp_path / "rejects", 0).write(rejects)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["0", "1", "2", "3"]


def test_the_first_of_a_kind_in_a_shard_is_logged(tmp_path, caplog):
    log = RejectLog(tmp_path / "rejects", 0)
    log.write([Reject("captions", "a.tar", str(key), "image_empty") for key in range(5)])
    log.write([Reject("captions", "a.tar", "5", "image_missing"), Reject("captions", "b.tar", "0", "image_empty")])
    assert len(caplog.messages) == 3 and "shard a.tar, sample 0: the image has no bytes" in caplog.messages[0]
