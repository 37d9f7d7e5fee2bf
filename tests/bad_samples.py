"""Samples that are bad in every way the tests know, good ones of every kind, and tars of both."""

import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.vlm.data.loader import Loader
from tests.samples import encoded, jpeg, noise, write_tar
from tests.tiny_data import Characters, make_job

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


def wholly_bad(kind: str) -> Callable[[str], Members]:
    return kinds_of_bad()[kind][1]
