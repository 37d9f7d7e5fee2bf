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

from experiments.vlm.config import Source
from experiments.vlm.data import formats
from experiments.vlm.data import loader as loader_module
from experiments.vlm.data import report as report_of_data
from experiments.vlm.data.formats import text
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.reject_log import RejectLog
from experiments.vlm.data.rejects import Reject
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
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
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
        "broken json": (
            "broken_json",
            lambda key: [(f"{key}.jpg", jpeg()), (f"{key}.json", b'{"caption": ')],
        ),
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
    """Tars in which every tenth sample is bad, of all kinds in turn: the keys of the good ones; of the bad,
    with the reason.
    """
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
    seen = Counter(s.key for step in loader for batch in step.batches for s in batch.samples if s.offset == 0)
    report = loader.report()["sources"]
    loader.close()
    path = Path(job.job.dump_folder) / "rejects" / "0.jsonl"
    return seen, report, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mixed_job(folder: Path, dump: Path, **options):
    job = make_job(folder, dump, epochs=1, **options)
    job.data.sources = job.data.sources[:1]
    job.data.sources[0].path = str(folder)
    return job


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


def tokens_of(loader: Loader, steps: int) -> list[np.ndarray]:
    return [next(loader).batches[0].tensors["tokens"].numpy().copy() for _ in range(steps)]


def test_a_source_that_vanished_ends_the_run_and_goes_on_once_it_is_back(tmp_path):
    folder = write_all(tmp_path / "data")
    job = make_job(folder, tmp_path / "out")
    job.data.sources[0].path = str(folder / "captions" / "captions-{0..2}.tar")
    loader = Loader(job, Characters())
    next(loader)
    state, expected = loader.state_dict(), tokens_of(loader, 8)
    loader.close()
    (folder / "captions").rename(folder / "away")
    with pytest.raises(
        DataError,
        match=r"captions: none of its 3 shards can be read \(shard_missing 3\); for example shard .*tar",
    ):
        Loader(job, Characters())
    (folder / "away").rename(folder / "captions")
    loader = Loader(job, Characters())
    loader.load_state_dict(state)
    assert all(map(np.array_equal, tokens_of(loader, 8), expected))
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_vanishes_while_it_is_read_ends_the_run(tmp_path, monkeypatch, workers):
    job = make_job(write_all(tmp_path / "data"), tmp_path / "out", num_workers=workers)
    loader = Loader(job, Characters())
    states = [next(loader).state() for _ in range(3)]
    loader.close()
    shutil.rmtree(tmp_path / "data" / "captions")
    # as if it had vanished right after
    monkeypatch.setattr(loader_module, "require_good_samples", lambda *_: None)
    job.data.sources[0].path = str(tmp_path / "data" / "captions" / "captions-{0..2}.tar")
    loader = Loader(job, Characters())
    with pytest.raises(DataError, match=r"source captions: none of its 3 shards can be read"):
        for state in (next(loader).state() for _ in range(200)):
            states.append(state)
    loader.close()
    assert all(b'"dry"' not in zlib.decompress(entry) for state in states for entry in state.values())


def wholly_bad(kind: str) -> Callable[[str], Members]:
    return kinds_of_bad()[kind][1]


@pytest.mark.parametrize("kind", kinds_of_bad())
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_source_without_one_good_sample_is_an_error_beside_good_ones(tmp_path, kind, epochs):
    folder = write_all(tmp_path / "data")
    (folder / "rotten").mkdir()
    members = [member for number in range(20) for member in wholly_bad(kind)(f"{number:02d}")]
    write_tar(folder / "rotten" / "a.tar", members)
    job = make_job(folder, tmp_path / "out", epochs=epochs)
    job.data.sources[1] = Source(name="rotten", format="cc12m", path=str(folder / "rotten"))
    reason = kinds_of_bad()[kind][0]
    with pytest.raises(DataError) as error:
        Loader(job, Characters())
    message = str(error.value)
    assert message.startswith(
        f"source rotten: none of the 20 samples that were tried is good ({reason} 20); for example shard "
        f"{folder}"
    )
    assert "a.tar, sample " in message and "\n" not in message


def test_a_held_out_source_without_a_good_sample_is_told_before_training(tmp_path):
    folder = write_all(tmp_path / "data")
    (tmp_path / "rotten").mkdir()
    write_tar(tmp_path / "rotten" / "a.tar", wholly_bad("no image")("1"))
    job = make_job(folder, tmp_path / "out")
    job.validation.sources = [Source(name="held out", format="cc12m", path=str(tmp_path / "rotten"))]
    Loader(job, Characters())
    job.validation.enable = True
    with pytest.raises(DataError, match="source held out: none of the 1 samples"):
        Loader(job, Characters())


def test_a_source_of_documents_that_are_all_too_long_is_an_error(tmp_path):
    job = make_job(
        write_all(tmp_path / "data"),
        tmp_path / "out",
        long_documents="drop",
        seq_len=64,
        max_patches_per_image=16,
    )
    (tmp_path / "data" / "texts" / "texts.jsonl").write_text(json.dumps({"text": "word " * 100}) + "\n")
    with pytest.raises(
        DataError, match=r"source texts: none of the 1 samples that were tried is good \(too_long 1\)"
    ):
        Loader(job, Characters())


def test_one_good_sample_among_many_is_enough(tmp_path):
    (tmp_path / "mixed").mkdir()
    members = [
        member
        for n in range(300)
        for member in (caption(jpeg()) if n == 211 else wholly_bad("zero bytes"))(f"{n:03d}")
    ]
    write_tar(tmp_path / "mixed" / "a.tar", members)
    job = mixed_job(tmp_path / "mixed", tmp_path / "out")
    seen, report, _ = read_all(job)
    assert (
        seen == Counter(["211"]) and report["captions"]["rejected"]["samples"]["image_empty"]["count"] == 299
    )


def test_a_source_of_which_nearly_all_shards_are_missing_stays_in_the_mixture(tmp_path):
    folder = write_all(tmp_path / "data")
    job = make_job(folder, tmp_path / "out")
    job.data.sources[0].path = str(folder / "captions" / "captions-{0..400}.tar")
    loader = Loader(job, Characters())
    given = [sum(batch.counts["samples/captions"] for batch in next(loader).batches) for _ in range(60)]
    loader.close()
    assert sum(given[-10:]) > 0


def test_slots_without_a_share_of_an_unshuffled_source_go_on_without_it(tmp_path):
    folder = write_all(tmp_path / "data")
    (folder / "few").mkdir()
    members = [
        member
        for n in range(4)
        for member in (wholly_bad("zero bytes") if n == 2 else caption(jpeg()))(f"few {n}")
    ]
    write_tar(folder / "few" / "a.tar", members)
    job = make_job(folder, tmp_path / "out", global_batch_size=8)
    job.data.sources[0] = Source(name="few", format="cc12m", path=str(folder / "few"), shuffle=False)
    loader = Loader(job, Characters())
    few = {
        sample.key
        for _ in range(10)
        for batch in next(loader).batches
        for sample in batch.samples
        if sample.source == "few"
    }
    loader.close()
    assert few == {"few 0", "few 1", "few 3"}


def test_slots_that_can_get_no_sample_ever_are_an_error(tmp_path):
    (tmp_path / "few").mkdir()
    write_tar(tmp_path / "few" / "a.tar", caption(jpeg())("0"))
    job = mixed_job(tmp_path / "few", tmp_path / "out", global_batch_size=4)
    job.data.epochs, job.data.sources[0].shuffle = 0, False
    with pytest.raises(DataError, match="slots 2 to 3 get no good sample of captions, ever"):
        next(Loader(job, Characters(), rank=1, ranks=2))


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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rotten_source_stops_the_run_when_asked_to(tmp_path, workers):
    (tmp_path / "rotten").mkdir()
    members = [
        member for n in range(1500) for member in caption(b"no image" if n % 3 else jpeg())(f"{n:04d}")
    ]
    write_tar(tmp_path / "rotten" / "a.tar", members)
    job = mixed_job(tmp_path / "rotten", tmp_path / "out", max_bad_fraction=0.7, num_workers=workers)
    if workers == 0:
        assert sum(1 for _ in Loader(job, Characters())) > 10
    job.data.max_bad_fraction = 0.5
    with pytest.raises(
        DataError,
        match=r"captions: \d+ of \d+ samples are bad \(6\d.\d%\), more than data.max_bad_fraction = 0.5",
    ):
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
