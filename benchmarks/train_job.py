"""The job whose step is measured: photographs of many sizes, cut from those of a folder with a fixed seed,
each with a caption of 20 to 300 words, packed to slots of S = 8192 tokens.
"""

import argparse
import io
import itertools
import math
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.__main__ import checked_job
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.spec import SPEC
from tests.samples import write_tar

ROOT = Path(__file__).parents[1]
WAYS = {
    "eager": [],
    "compiled": ["--compile.enable"],
    "graphed": ["--compile.enable", "--compile.cuda_graphs"],
    "fp8": ["--compile.enable", "--float8.enable"],
    "text": ["--compile.enable"],
}
WORDS = [
    "one",
    "two",
    "three",
    "small",
    "large",
    "red",
    "green",
    "house",
    "tree",
    "street",
    "above",
    "of",
    "a",
]
SHARDS, PHOTOS = 4, 240
SHORTEST, LONGEST = 96, 1400  # pixels of a side


def cut_photo(photos: list[Image.Image], draw: random.Random) -> bytes:
    """A piece of a photograph, resized; the logarithms of its sides are even."""
    height, width = (round(math.exp(draw.uniform(math.log(SHORTEST), math.log(LONGEST)))) for _ in "hw")
    photo = draw.choice(photos)
    scale = min(1.0, photo.width / width, photo.height / height)
    box_width, box_height = int(width * scale), int(height * scale)
    left, top = draw.randint(0, photo.width - box_width), draw.randint(0, photo.height - box_height)
    piece = photo.resize((width, height), box=(left, top, left + box_width, top + box_height))
    buffer = io.BytesIO()
    piece.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def write_shards(folder: Path, photos: Path) -> None:
    """Tars of pictures and captions, as CC12M has them."""
    opened = [Image.open(path).convert("RGB") for path in sorted(photos.glob("*.[jp][pn]g"))]
    draw = random.Random(0)
    for shard in range(SHARDS):
        members = []
        for number in range(PHOTOS // SHARDS):
            caption = " ".join(draw.choices(WORDS, k=draw.randint(20, 300))).encode()
            name = f"{shard:05d}{number:04d}"
            members += [(f"{name}.jpg", cut_photo(opened, draw)), (f"{name}.txt", caption)]
        write_tar(folder / f"{shard:05d}.tar", members)


def add_job_arguments(parser: argparse.ArgumentParser, flavor: str, accumulation: int) -> None:
    """What `job_of` and `write_shards` ask for, with these defaults."""
    parser.add_argument("--flavor", default=flavor)
    parser.add_argument("--slots", type=int, default=2, help="of a forward")
    parser.add_argument("--accumulation", type=int, default=accumulation, help="forwards of a step")
    parser.add_argument("--photos", type=Path, default=ROOT / "tests/photographs")


def job_of(options: argparse.Namespace, way: str, given: list[str], folder: Path) -> VLMJobConfig:
    slots = str(options.slots)
    argv = [
        *("--model.flavor", options.flavor, "--job.dump_folder", str(folder / way)),
        *("--model.tokenizer_path", str(ROOT / "assets/tokenizer")),
        *("--training.dataset", "cc12m", "--training.dataset_path", str(folder)),
        *("--training.local_batch_size", slots, "--training.seq_len", "8192"),
        *("--training.global_batch_size", str(options.slots * options.accumulation)),
        *("--training.steps", "1000", "--optimizer.lr", "1e-5"),
        *("--data.patches_per_row", "14336", "--data.num_workers", "6", "--comm.trace_buf_size", "0"),
        *WAYS[way],
        *given,
    ]
    job = checked_job(argv, 1)
    assert isinstance(job, VLMJobConfig)
    return job


def batches_of(job: VLMJobConfig, tokenizer: Any, steps: int) -> Iterator[list[Any]]:
    """The batches of each of a rank's first steps. They hold until the next: the loader writes that into the
    same memory.
    """
    place = {"rank": 0, "ranks": 1, "split": "train", "control": None, "agree": None, "group": None}
    with closing(SPEC.build_loader(job, tokenizer, **place)) as loader:
        for step in itertools.islice(loader, steps):
            yield step.batches
