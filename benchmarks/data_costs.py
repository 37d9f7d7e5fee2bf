"""What grows in the loader with sources, shards, ranks and the size of files, and what memory it takes.

    python -m benchmarks.data_costs [--only units rejects ...] [--lines 200000] [--megabytes 128]
        [--side 6000]

    units      finding a unit among 12 sources of 20,000 shards
    rejects    the first reject after a restart, where the ranks have written so many lines
    scan       opening a JSONL of so many megabytes: the first process, and the next
    groups     decodings of each row group of a large parquet file until three openings have read it at random
               places; and of a damaged one of 50 records
    base64     40 images of 100 KB in one line: parsings of it, and milliseconds, to load them all
    dry        of the slots' time, the share left to padding where data.epochs = 1; records alike, and shards
               of 70 to 130 % of the mean
    images     the peak of decoding one image of side x side pixels, in bytes a pixel; and of four threads
               that decode two of each, as a multiple of the largest one
    ring       slots of memory for batches, with 32 slots a rank of one a forward and two workers

Expected, since each is done once: microseconds for a unit, milliseconds for a restart and a second opening,
1 decoding and 1 parsing, less than 7 % dry where records are alike; of an image what Pillow and the format's
decoder hold (4 to 20 bytes a pixel), whatever the threads; 36 slots (32 of a step and 2 forwards ahead for
each worker).

Each runs in a process of its own. To compare with another checkout, run this file from its folder:
PYTHONPATH=. python PATH/benchmarks/data_costs.py
"""

import argparse
import base64
import contextlib
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

Figures = dict[str, float | int | str]


def units(options: argparse.Namespace, folder: Path) -> Figures:
    from experiments.vlm.data.sources.order import Deal

    paths = tuple(f"shard-{number:05d}.tar" for number in range(20_000))
    deals = [Deal(f"source {number}", paths, 512, 1, None) for number in range(12)]
    draw = random.Random(0)
    asked = [(draw.choice(deals), draw.randrange(512), draw.randrange(60)) for _ in range(2000)]
    for deal in deals:  # the orders of two epochs are drawn
        deal.unit(0, 0), deal.unit(0, 60)
    started = time.perf_counter()
    for deal, slot, number in asked:
        deal.unit(slot, number)
    return {"us a unit": (time.perf_counter() - started) / len(asked) * 1e6}


def rejects(options: argparse.Namespace, folder: Path) -> Figures:
    from experiments.vlm.data.reject_log import RejectLog
    from experiments.vlm.data.rejects import Reject

    ranks = 8
    if not (folder / "rejects").exists():  # written by a process of its own
        for rank in range(ranks):
            keys = range(rank, options.lines, ranks)
            lines = [
                Reject("captions", f"shard-{key % 999}.tar", f"{key:09d}", "image_empty") for key in keys
            ]
            RejectLog(folder / "rejects", rank).write(lines)
        return _again("rejects", options, folder)
    before, started = _memory("VmRSS"), time.perf_counter()
    log = RejectLog(folder / "rejects", 0)
    log.write([Reject("captions", "shard-0.tar", "new", "image_empty")])
    return {"seconds": time.perf_counter() - started, "MiB": _memory("VmRSS") - before}


def scan(options: argparse.Namespace, folder: Path) -> Figures:
    path = folder / "texts.jsonl"
    first = not path.exists()
    if first:
        line = json.dumps({"text": "x" * 180}).encode() + b"\n"
        path.write_bytes(line * (options.megabytes * 1_000_000 // len(line)))
    (folder / "small.jsonl").write_text('{"text": "a"}')
    _open(folder / "small.jsonl", "text", folder)  # imports
    started = time.perf_counter()
    _open(path, "text", folder)
    seconds = time.perf_counter() - started
    return (
        {"first": seconds, "next": _again("scan", options, folder)["first"]} if first else {"first": seconds}
    )


def groups(options: argparse.Namespace, folder: Path) -> Figures:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from experiments.vlm.data.formats import row_groups
    from experiments.vlm.data.rejects import Rejected

    rows, a_group = 400, 50
    texts = [{"text": random.Random(row).randbytes(20_000).hex()} for row in range(rows)]
    pq.write_table(pa.Table.from_pylist(texts), folder / "texts.parquet", row_group_size=a_group)
    row_groups.ROW_GROUP_BYTES = 4 << 20  # two of eight groups
    row_groups._kept = type(row_groups._kept)(4 << 20)
    decoded, read = [], pq.ParquetFile.read_row_group
    pq.ParquetFile.read_row_group = lambda file, i, **more: decoded.append(i) or read(file, i, **more)
    draw = random.Random(0)
    for _ in range(3):
        shard = _open(folder / "texts.parquet", "text", folder)
        for _ in range(100):
            shard.read(draw.randrange(rows))
    each = len(decoded) / (rows // a_group)
    damaged = bytearray((folder / "texts.parquet").read_bytes())
    place = pq.ParquetFile(folder / "texts.parquet").metadata.row_group(1).column(0).data_page_offset
    damaged[place : place + 30] = b"\xff" * 30
    (folder / "damaged.parquet").write_bytes(damaged)
    shard = _open(folder / "damaged.parquet", "text", folder)
    decoded.clear()
    for row in range(a_group, 2 * a_group):
        with contextlib.suppress(Rejected):
            shard.read(row)
    return {"decodings of a group": each, "of a damaged one": len(decoded)}


def base64_images(options: argparse.Namespace, folder: Path) -> Figures:
    from PIL import Image

    parts = np.random.default_rng(0).integers(0, 255, (40, 180, 180, 3), np.uint8)
    images = []
    for pixels in parts:
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        images.append({"bytes": base64.b64encode(data.getvalue()).decode()})
    (folder / "x.jsonl").write_text(json.dumps({"texts": [None] * 40, "images": images}))
    shard = _open(folder / "x.jsonl", "obelics", folder)
    found = [part for part in shard.read(0)[0].parts if hasattr(part, "locator")]
    parsed, parse = [], json.loads
    json.loads = lambda text, **more: parsed.append(1) or parse(text, **more)
    started = time.perf_counter()
    for image in found:
        shard.load(image)
    return {"parsings, of planning too": len(parsed) + 1, "ms": (time.perf_counter() - started) * 1e3}


def dry(options: argparse.Namespace, folder: Path) -> Figures:
    figures: Figures = {}
    for shards, slots in ((9, 8), (20, 8), (272, 64), (100, 64)):
        shares = [f"{100 * _dry(shards, slots, vary):.1f} %" for vary in (0.0, 0.3)]
        figures[f"{shards} shards, {slots} slots"] = " / ".join(shares)
    return figures


def _dry(shards: int, slots: int, vary: float) -> float:
    from experiments.vlm.data.sources.order import Deal

    draw = np.random.default_rng(0)
    sizes = [int(2000 * (1 + vary * (2 * draw.random() - 1))) for _ in range(shards)]
    lengths = [draw.lognormal(0, 1, size) for size in sizes]
    deal = Deal("texts", tuple(map(str, range(shards))), slots, 0, 1)
    totals = []
    for slot in range(slots):
        number, total = 0, 0.0
        while unit := deal.unit(slot, number):
            total += lengths[unit.shard][deal.order(unit, sizes[unit.shard])].sum()
            number += 1
        totals.append(total)
    return 1 - float(np.mean(totals) / np.max(totals))


def images(options: argparse.Namespace, folder: Path) -> Figures:
    figures: Figures = {}
    for name, data in _bombs(options.side):
        (folder / name).write_bytes(data)
        peak = _again(f"peak:{name}", options, folder)["peak"]
        figures[name] = float(peak) / options.side**2
    largest = max(float(value) for value in figures.values())
    peak = float(_again("peak:" + ",".join(list(figures) * 2), options, folder)["peak"])
    return figures | {"four threads": peak / options.side**2 / largest}


def _bombs(side: int) -> Iterator[tuple[str, bytes]]:
    from PIL import Image

    red = Image.new("RGB", (side, side), "red")
    grey = Image.fromarray(np.full((side, side), 40000, np.uint16))
    yield "rgb.png", _encoded(red, "PNG", compress_level=1)
    yield "rgba.png", _encoded(Image.new("RGBA", (side, side), (9, 9, 9, 99)), "PNG", compress_level=1)
    yield "grey16.png", _encoded(grey, "PNG", compress_level=1)
    yield "white.webp", _encoded(red, "WEBP", lossless=True, method=0, quality=0)
    yield "progressive.jpg", _encoded(red, "JPEG", progressive=True, subsampling=0)
    small = bytearray(_encoded(red.crop((0, 0, 60, 40)), "JPEG"))
    place = small.index(b"\xff\xc0") + 5
    small[place : place + 4] = side.to_bytes(2, "big") * 2
    yield "lying.jpg", bytes(small)


def peak(names: str, folder: Path) -> Figures:
    """Bytes that decoding these files takes at its peak."""
    from experiments.vlm.data import image

    files = [(folder / name).read_bytes() for name in names.split(",")]
    image.decode(_encoded(_small(), "PNG"), 32, 32)
    image.KEPT_PIXELS = 0
    if hasattr(image, "_memory"):  # one at a time, as it would be at a larger size
        image._memory = image.DecodingMemory(1)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmHWM")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda data: image.decode(data, 256, 256), files))
    return {"peak": (_memory("VmHWM") - before) * 2**20}


def ring(options: argparse.Namespace, folder: Path) -> Figures:
    from experiments.vlm.config import Source, VLMJobConfig
    from experiments.vlm.data.loader import Loader
    from experiments.vlm.data.prefetch import FromWorkers
    from torchtitan.components.tokenizer import load_tokenizer

    lines = "".join(json.dumps({"text": f"{number} " * 40}) + "\n" for number in range(2000))
    (folder / "texts.jsonl").write_text(lines)
    job = VLMJobConfig()
    job.data.sources = [Source(format="text", path=str(folder / "texts.jsonl"))]
    job.data.num_workers, job.data.cache_folder = 2, str(folder / "cache")
    job.data.patches_per_row = job.data.max_patches_per_image = 64
    job.training.seq_len, job.training.local_batch_size, job.training.global_batch_size = 128, 1, 32
    loader = Loader(job, load_tokenizer("assets/tokenizer"))
    step = next(loader)
    assert loader.supply is not None and isinstance(loader.supply.forwards, FromWorkers)
    buffers = loader.supply.forwards.buffers
    held = sum(array.nbytes for arrays in buffers.arrays for array in arrays.values())
    loader.close()
    return {"slots": held / sum(tensor.nbytes for tensor in step.batches[0].tensors.values())}


MEASURES: dict[str, Callable[[argparse.Namespace, Path], Figures]] = {
    "units": units,
    "rejects": rejects,
    "scan": scan,
    "groups": groups,
    "base64": base64_images,
    "dry": dry,
    "images": images,
    "ring": ring,
}


def _open(path: Path, format: str, folder: Path):
    from experiments.vlm.config import Data, Source
    from experiments.vlm.data.sources.shards import open_shard

    return open_shard(str(path), Source(format=format), Data(cache_folder=str(folder / "cache")))


def _small():
    from PIL import Image

    return Image.new("RGBA", (64, 64), (1, 2, 3, 4))


def _encoded(image, format: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def _memory(name: str) -> float:
    """MiB of this process, as Linux counts them."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def _again(name: str, options: argparse.Namespace, folder: Path) -> Figures:
    """A measure in a process of its own, with the files of `folder`."""
    sizes = [f"--{size}={getattr(options, size)}" for size in ("lines", "megabytes", "side")]
    command = [sys.executable, __file__, "--only", name, "--folder", str(folder), *sizes]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(MEASURES))
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--side", type=int, default=6000)
    parser.add_argument("--folder", type=Path, help="where files are that another process wrote")
    options = parser.parse_args()
    found: dict[str, Figures] = {}
    for name in options.only:
        if options.folder is None:
            with tempfile.TemporaryDirectory() as folder:
                found[name] = _again(name, options, Path(folder))
        elif name.startswith("peak:"):
            found[name] = peak(name.removeprefix("peak:"), options.folder)
        else:
            found[name] = MEASURES[name](options, options.folder)
        if options.folder is None:
            printed = ", ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in found[name].items()
            )
            print(f"{name:8s} {printed}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
