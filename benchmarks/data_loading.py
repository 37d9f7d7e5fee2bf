"""How close does the loader come to the bare decoder, from tar to collated batch?

    python -m benchmarks.data_loading [--images 96] [--rounds 3]

Photo-like JPEGs of 400 to 1600 pixels in CC12M tars, to at most 1024 patches of 16 x 16, S = 4096. The
measure is the bare fastest chain: bytes in memory, sizes known, simplejpeg into kept memory, torch's
antialiased resize, nothing else; each contestant takes turns with it on as many threads, and "of bare" is the
median over those pairs of turns in which others kept less than 0.1 cores busy ("quiet"); where there are none
it is in brackets and says little, since who has more processes gets more of a busy machine. The ratio of CPU
time holds there too, but knows nothing of waiting.

Expected: 1. end to end on two idle cores at least 85 % of the bare chain. The decoder takes 3 ms of an
image's 4.4 and the resize 1; patches are one pass over 0.8 MB (0.2 ms), reading, planning and writing 0.2 ms
together.
2. at least 73 %, nine times the public torchtitan experiment's loader (18 to 20 images/s on the two cores
where the bare chain made 235).
3. at least 3.5 times transformers' SigLIP2 image processor, which decodes and resizes with Pillow, holds
floats and turns patches.
"""

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import simplejpeg
import torch
from PIL import Image

from benchmarks.data_stages import Stages
from benchmarks.photos import make_jpegs
from benchmarks.turns import Contestant, Counts, Seat, Skipped
from experiments.vlm.config import Source, VLMJobConfig
from experiments.vlm.data import image as image_module
from experiments.vlm.data.image import probe
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.data.loader import Loader, Step
from tests.tiny_data import WORDS
from torchtitan.components.tokenizer import load_tokenizer

PLAN = ImagePlan()
SEQ_LEN, SLOTS, SHARDS, BATCH = 4096, 2, 4, 8
QUIET = 0.1  # cores
TOKENIZER = str(Path(__file__).parent.parent / "assets/tokenizer")


@dataclass(frozen=True)
class Photo:
    data: bytes
    size: tuple[int, int]
    target: tuple[int, int]


def read_photos(folder: Path) -> list[Photo]:
    photos = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for file in (tar.extractfile(member) for member in tar if member.name.endswith(".jpg")):
                data = file.read() if file else b""
                size = probe(data)
                h, w = PLAN.grid(*size)
                photos.append(Photo(data, size, (h * PLAN.patch_size, w * PLAN.patch_size)))
    return photos


def bare(photo: Photo) -> object:
    return image_module._decode_fast(photo.data, photo.size, photo.target, PLAN.resample)


def interpolate(photo: Photo) -> object:
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(photo.data)).unsqueeze(0).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(pixels, photo.target, mode="bilinear", antialias=True)


def pillow(photo: Photo) -> object:
    image = Image.open(io.BytesIO(photo.data)).convert("RGB")
    return np.asarray(image.resize(photo.target[::-1], Image.Resampling.BILINEAR))


class Chain:
    """A function of each photo, in threads."""

    def __init__(self, call: Callable[[Photo], object], folder: Path, threads: int):
        self.call, self.photos, self.pool = call, read_photos(folder), ThreadPoolExecutor(threads)

    def prepare(self) -> None: ...

    def run(self) -> Counts:
        for _ in self.pool.map(self.call, self.photos):
            pass
        return {
            "images": len(self.photos),
            "megapixels": sum(h * w for h, w in (photo.size for photo in self.photos)) / 1e6,
        }

    def workers(self) -> list[int]:
        return []


class Ours:
    """The loader end to end."""

    def __init__(self, folder: Path, images: int, patches_per_row: int, workers: int, threads: int):
        job = make_job(folder, patches_per_row)
        job.data.num_workers, job.data.decode_threads = workers, threads
        self.images, self.job, self.loader = images, job, Loader(job, load_tokenizer(TOKENIZER))
        for _ in range(4):  # until the look-ahead is full
            next(self.loader)

    def prepare(self) -> None:
        for _ in range(self.job.data.prefetch + 1):  # those that were ready, and one that was not
            next(self.loader)

    def run(self) -> Counts:
        totals: Counter = Counter()
        while totals["images"] < self.images:
            totals.update(self._count(next(self.loader)))
        return dict(totals)

    def _count(self, step: Step) -> Counts:
        batch, data = step.batches[0], self.job.data
        megapixels = sum(h * w for sample in batch.samples for h, w in sample.image_sizes) / 1e6
        room = {"token_room": SLOTS * SEQ_LEN, "patch_room": SLOTS * data.patches_per_row}
        return (
            {name: batch.counts[name] for name in ("images", "tokens", "patches")}
            | {"megapixels": megapixels}
            | room
        )

    def workers(self) -> list[int]:
        forwards = self.loader.supply.forwards if self.loader.supply else None
        return [worker.process.pid for worker in getattr(forwards, "workers", [])]


class Processor:
    """transformers' SigLIP2 image processor in a torch DataLoader, fed with bytes from memory."""

    def __init__(self, folder: Path, workers: int):
        try:
            from transformers import Siglip2ImageProcessor
        except ImportError as error:
            raise Skipped(f"transformers' processor: {error}") from error
        self.processor = Siglip2ImageProcessor(patch_size=PLAN.patch_size, max_num_patches=PLAN.max_patches)
        self.photos, self.ahead = read_photos(folder), 2 * workers + 1
        endless = [number % len(self.photos) for number in range(len(self.photos) * 1000)]
        options: dict[str, Any] = (
            {"num_workers": workers, "prefetch_factor": 2, "multiprocessing_context": "fork"}
            if workers
            else {}
        )
        loader: Iterable = torch.utils.data.DataLoader(
            cast(Any, self.photos), BATCH, sampler=endless, collate_fn=self.collate, **options
        )
        self.batches = iter(loader)

    def collate(self, photos: list[Photo]) -> tuple[object, Counts]:
        images = [Image.open(io.BytesIO(photo.data)).convert("RGB") for photo in photos]
        counts = {
            "images": len(photos),
            "megapixels": sum(photo.size[0] * photo.size[1] for photo in photos) / 1e6,
        }
        return dict(self.processor(images=images, return_tensors="pt")), counts

    def prepare(self) -> None:
        for _ in range(self.ahead):
            next(self.batches)

    def run(self) -> Counts:
        totals: Counter = Counter()
        while totals["images"] < len(self.photos):
            totals.update(next(self.batches)[1])
        return dict(totals)

    def workers(self) -> list[int]:
        return [worker.pid for worker in getattr(self.batches, "_workers", [])]


def make_job(folder: Path, patches_per_row: int) -> VLMJobConfig:
    job = VLMJobConfig()
    job.job.dump_folder = str(folder / "outputs")
    job.training.local_batch_size, job.training.seq_len = SLOTS, SEQ_LEN
    job.data.sources = [Source(format="cc12m", path=str(folder))]
    job.data.patches_per_row = patches_per_row
    return job


def write_shards(folder: Path, count: int) -> int:
    """Tars of photos with captions; the patches a row that suit them: S times their patches per token."""
    random, tokenizer, tokens, patches = np.random.default_rng(0), load_tokenizer(TOKENIZER), 0, 0
    jpegs = make_jpegs(count)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, data in enumerate(jpegs[shard::SHARDS]):
                caption = " ".join(random.choice(WORDS, int(random.integers(8, 30))))
                for extension, content in (("jpg", data), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{shard:05d}{number:04d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                h, w = PLAN.grid(*probe(data))
                patches += h * w
                tokens += h * w // PLAN.merge_size**2 + 4 + len(tokenizer.encode(caption))
    return SEQ_LEN * patches // tokens // PLAN.merge_size**2 * PLAN.merge_size**2


def contestants(
    folder: Path, images: int, patches_per_row: int
) -> dict[int, dict[str, Callable[[], Contestant]]]:
    """By the number of cores that they can use."""

    def ours(workers: int, threads: int) -> Callable[[], Contestant]:
        return partial(Ours, folder, images, patches_per_row, workers, threads)

    def chains(threads: int) -> dict[str, Callable[[], Contestant]]:
        calls = {"bare": bare, "simplejpeg + interpolate": interpolate, "Pillow + Pillow": pillow}
        return {name: partial(Chain, call, folder, threads) for name, call in calls.items()}

    processor = "transformers' SigLIP2 processor"
    stages = partial(Stages, make_job(folder, patches_per_row), TOKENIZER, images)
    one = chains(1) | {"stages": stages, processor: partial(Processor, folder, 0)}
    two = chains(2) | {processor: partial(Processor, folder, 2)}
    one |= {f"ours, {workers} workers x 1 thread": ours(workers, 1) for workers in (0, 1)}
    two |= {
        f"ours, {workers} workers x {threads} threads": ours(workers, threads)
        for workers, threads in ((0, 2), (1, 2), (2, 1), (2, 2))
    }
    return {1: one, 2: two}


def measure(makers: dict[str, Callable[[], Contestant]], rounds: int) -> dict[str, dict]:
    """Each contestant in turns with the first, which is the measure."""
    found: dict[str, dict] = {}
    measure_name = next(iter(makers))
    base = Seat(makers.pop(measure_name))
    for name, make in makers.items():
        try:
            seat = Seat(make)
        except Skipped as skipped:
            print(f"skipped: {skipped}", flush=True)
            continue
        turns = [(base.turn(), seat.turn()) for _ in range(rounds)]
        seat.close()
        found.setdefault(measure_name, {"turns": [], "quiet": 0})["turns"] += [first for first, _ in turns]
        found[name] = {"turns": [own for _, own in turns]} | compare(turns)
    base.close()
    return {name: summary(result) for name, result in found.items()}


def compare(turns: list[tuple[Counts, Counts]]) -> dict:
    """Ratios to the measure in the same pair of turns."""
    quiet = [pair for pair in turns if all(turn["others"] < QUIET for turn in pair)]
    by_clock = [rate(own, "seconds") / rate(first, "seconds") for first, own in quiet or turns]
    by_cpu = [rate(own, "cpu_s") / rate(first, "cpu_s") for first, own in turns]
    ratios = {"of_bare": statistics.median(by_clock), "lowest": min(by_clock), "highest": max(by_clock)}
    return ratios | {"quiet": len(quiet), "of_bare_cpu": statistics.median(by_cpu)}


def rate(turn: Counts, by: str) -> float:
    return turn["images"] / turn[by]


def summary(result: dict) -> dict:
    total: Counter = Counter()
    count = len(result["turns"])
    for turn in result.pop("turns"):
        total.update(turn)
        memory = {name: turn[name] for name in ("process_mb", "workers_mb")}  # the last is the peak
    per_s = {f"{name}_per_s": total[name] / total["seconds"] for name in ("images", "megapixels", "tokens")}
    room = {
        name: total[name] / total[of]
        for name, of in (("tokens", "token_room"), ("patches", "patch_room"))
        if total[of]
    }
    stages = {name: total[name] / total["images"] * 1e3 for name in total if name.startswith("stage ")}
    result["others"] = total["others"] / count
    return result | per_s | memory | room | stages | {"cpu_ms": total["cpu_s"] / total["images"] * 1e3}


def print_table(found: dict[int, dict[str, dict]]) -> None:
    ratios = "of bare (lowest to highest; quiet pairs) | others' cores | CPU ms an image | of bare, by CPU"
    print(f"\n| chain | cores | images/s | MP/s | tokens/s | {ratios} | MB: process + workers |")
    print("|---" * 10 + "|")
    for cores, results in found.items():
        for name, result in results.items():
            if name == "stages":
                continue
            tokens = f"{result['tokens_per_s']:.0f}" if result["tokens_per_s"] else ""
            rates = f"{result['images_per_s']:.0f} | {result['megapixels_per_s']:.0f} | {tokens}"
            rates += f" | {by_clock(result)} | {result['others']:.2f}"
            memory = f"{result['process_mb']:.0f} + {result['workers_mb']:.0f}"
            print(
                f"| {name} | {cores} | {rates} | {result['cpu_ms']:.2f} | {result.get('of_bare_cpu', 1):.2f} "
                f"| {memory} |"
            )
    print("\n| stage of ours, one thread | CPU ms an image | of the bare chain |\n|---|---|---|")
    stages, whole = found[1]["stages"], found[1]["bare"]["cpu_ms"]
    for name, ms in (
        (name.removeprefix("stage "), ms) for name, ms in stages.items() if name.startswith("stage ")
    ):
        print(f"| {name} | {ms:.3f} | {ms / whole:.1%} |")


def by_clock(result: dict) -> str:
    if "of_bare" not in result:
        return "1"
    shown = f"{result['of_bare']:.2f} ({result['lowest']:.2f} to {result['highest']:.2f}; {result['quiet']})"
    return shown if result["quiet"] else f"[{shown}]"


def print_verdict(found: dict[int, dict[str, dict]]) -> None:
    """Over every way to use two cores, not the luckiest."""
    peer = next((result for name, result in found[2].items() if name.startswith("transformers")), None)
    print(
        "\nexpected: 0.85 of the bare chain (nine times torchtitan's loader: 0.73), 3.5 times transformers' "
        "processor"
    )
    for name, result in ((name, result) for name, result in found[2].items() if name.startswith("ours")):
        fill = f"tokens {result['tokens']:.1%} and patches {result['patches']:.1%} of a slot filled"
        times = (
            f", {result['of_bare'] / peer['of_bare']:.1f} (by CPU "
            f"{result['of_bare_cpu'] / peer['of_bare_cpu']:.1f})"
            if peer
            else ""
        )
        print(f"{name}: {by_clock(result)}, by CPU {result['of_bare_cpu']:.2f}{times}; {fill}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        patches_per_row = write_shards(folder, arguments.images)
        print(
            f"{arguments.images} JPEGs, S = {SEQ_LEN}, L = {patches_per_row}, {SLOTS} slots; load "
            f"{os.getloadavg()[0]:.1f}"
        )
        print(
            "skipped: timm's NaFlex data set, which needs torchvision; there is no build of it for this "
            "torch",
            flush=True,
        )
        makers = contestants(folder, arguments.images, patches_per_row)
        found = {cores: measure(of_cores, arguments.rounds) for cores, of_cores in makers.items()}
    print_table(found)
    print_verdict(found)
    print(
        "\n"
        + json.dumps(
            {"benchmark": "data_loading", "cores": os.cpu_count(), "load": os.getloadavg()[0], "found": found}
        )
    )


if __name__ == "__main__":
    main()
