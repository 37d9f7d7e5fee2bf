"""A small data set for loader tests: captions in tars, interleaved documents and text in JSON lines; and a
job that reads it.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from experiments.vlm.config import Source, VLMJobConfig
from tests.samples import jpeg, write_tar

WORDS = [
    "red",
    "green",
    "blue",
    "square",
    "circle",
    "left",
    "right",
    "above",
    "below",
    "small",
    "large",
    "one",
    "two",
    "three",
]


@dataclass
class Characters:
    """A tokenizer with a token for each byte. Picklable."""

    vocab_size: int = 320
    bos_id: int | None = 256
    eos_id: int = 257
    pad_id: int = 258
    image_id: int = 259
    begin_image_id: int = 260
    end_image_id: int = 261
    hidden: ClassVar[dict[int, str]] = {257: "</s>", 259: "<image>"}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        spans = [(place, place + 1) for place, character in enumerate(text) for _ in character.encode()]
        return self.encode(text), spans

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def special_id(self, spelling: str) -> int | None:
        return 262 if spelling == "<|turn|>" else None


@dataclass
class Stumbling(Characters):
    """Fails on a text that the data has: a mistake of ours, not of the data."""

    def encode(self, text: str) -> list[int]:
        if "document 1-007" in text:
            raise ZeroDivisionError("in the tokenizer")
        return super().encode(text)


def sentence(random: np.random.Generator, least: int, most: int) -> str:
    return " ".join(random.choice(WORDS, int(random.integers(least, most + 1))))


def image(random: np.random.Generator) -> bytes:
    return jpeg(
        int(random.integers(16, 130)), int(random.integers(16, 130)), seed=int(random.integers(1 << 30))
    )


def write_captions(folder: Path, shards: int = 3, records: int = 20, seed: int = 0) -> list[str]:
    """Tars of captioned images; the keys, `SHARD-RECORD`."""
    random, keys = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        names = [f"{shard}-{record:03d}" for record in range(records)]
        members = [
            member
            for name in names
            for member in (
                (f"{name}.jpg", image(random)),
                (f"{name}.txt", f"{name}: {sentence(random, 2, 6)}".encode()),
            )
        ]
        write_tar(folder / f"captions-{shard}.tar", members)
        keys += names
    return keys


def write_documents(folder: Path, shards: int = 2, records: int = 15, seed: int = 1) -> list[str]:
    """JSON lines of interleaved documents with 0 to 4 images; the texts' first words, `document
    SHARD-RECORD`.
    """
    random, names = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        lines = []
        for record in range(records):
            names.append(f"document {shard}-{record:03d}")
            texts: list[str | None] = [f"{names[-1]} {sentence(random, 3, 30)}"]
            images: list[dict | None] = [None]
            for _ in range(int(random.integers(0, 5))):
                texts += [None, sentence(random, 1, 20)]
                images += [{"bytes": base64.b64encode(image(random)).decode(), "path": None}, None]
            lines.append(json.dumps({"texts": texts, "images": images}))
        (folder / f"documents-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return names


def write_texts(folder: Path, records: int = 12, seed: int = 2) -> None:
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"text {record} {sentence(random, 5, 80)}"}) for record in range(records)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")


def write_all(folder: Path) -> Path:
    write_captions(folder / "captions")
    write_documents(folder / "documents")
    write_texts(folder / "texts")
    return folder


def sources(folder: Path) -> list[Source]:
    return [
        Source(name="captions", format="cc12m", path=str(folder / "captions"), weight=2.0, shuffle_buffer=8),
        Source(name="documents", format="obelics", path=str(folder / "documents")),
        Source(name="texts", format="text", path=str(folder / "texts"), weight=0.5),
    ]


def make_job(folder: Path, dump: Path, **data) -> VLMJobConfig:
    """Slots of 256 tokens and 256 patches of 16 pixels; `data` sets fields of [data], or of [training] by the
    same names.
    """
    job = VLMJobConfig()
    job.job.dump_folder = str(dump)
    job.training.seq_len, job.training.local_batch_size = 256, 2
    job.data.sources = sources(folder)
    job.data.patches_per_row, job.data.max_patches_per_image, job.data.packing_buffer_size = 256, 64, 16
    job.data.cache_folder = str(dump / "cache")
    for name, value in data.items():
        section = job.data if hasattr(job.data, name) else job.training
        assert hasattr(section, name), name
        setattr(section, name, value)
    return job
