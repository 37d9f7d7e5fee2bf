"""A whole training run without files: small models, and a loader that draws its slots from numbers.

What slot s holds in step n depends on s and n alone, so every layout and every restart trains alike. Slots
hold documents with images of many shapes, one-token documents, padding, and, every fourth slot, no image at
all; some ranks then see text alone. Of two sources, the other has every third document of a slot.
"""

import dataclasses
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from experiments.vlm.batch import Batch, Delivered
from experiments.vlm.check import check_encoder, check_patches
from experiments.vlm.config import Source, VLMJobConfig
from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, TilesConfig, VLMConfig
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model.towers import aimv2, clip, dinov3
from experiments.vlm.model_config import model_config, plan_of
from experiments.vlm.spec import SPEC
from tests.reference.batches import Document, Picture, Sizes, build_batch, draw_picture
from torchtitan.build import build
from torchtitan.config.check import RANGES, check_pipeline, check_ranges, check_selective, check_sequence
from torchtitan.config.layout import degrees, resolve_batch
from torchtitan.distributed.process_group import close_process_group, open_process_group
from torchtitan.models.decoder.check import check_decoder
from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.train import Trainer

VOCAB = 128
SLOTS, SEQ_LEN, PATCHES = 8, 64, 96
STEPS_AN_EPOCH = 3
SOURCES = ("drawn", "other")
HELD_OUT = 1000  # the step whose slots are those of validation

ENCODER = EncoderConfig(32, 2, 4, 64, patch_size=4, position_grid=4)
DECODER = DecoderConfig(64, 4, 8, 4, 8, 96, VOCAB, 10000.0, norm_eps=1e-5)
DECODERS = {
    "llama": DECODER,
    "qwen2": dataclasses.replace(DECODER, qkv_bias=True, tied_embeddings=True),
    "qwen3": dataclasses.replace(DECODER, qk_norm=True),
    "qwen3-tied": dataclasses.replace(DECODER, qk_norm=True, tied_embeddings=True),
}
# One of each kind: a class token with a place of its own, of the second last layer; waves and a gated MLP;
# rotary positions, registers and scales, with two features side by side.
TOWERS = {
    "clip": EncoderConfig(32, 3, 4, 64, 4, 4, 1e-5, **clip.KIND, activation="quick_gelu"),
    "aimv2": EncoderConfig(32, 2, 4, 64, 4, 4, 1e-5, **aimv2.KIND, **aimv2.PLAIN, positions="waves"),
    "dinov3": EncoderConfig(
        32, 3, 4, 64, 4, **dinov3.KIND, **dinov3.PLAIN, gated_mlp=True, feature_layers=(1, -2)
    ),
}
FLAVORS.update(
    {
        f"small-{name}": VLMConfig(tower, ProjectorConfig(48), DECODERS["qwen3"])
        for name, tower in TOWERS.items()
    }
)
LLAVA = dataclasses.replace(TOWERS["clip"], image_size=16)
FLAVORS["small-llava"] = VLMConfig(LLAVA, ProjectorConfig(64, False, 1), DECODER, "llava", "padded")
GRIDS = ((1, 2), (2, 1), (2, 2))
LINED = ProjectorConfig(64, False, 1, newline=True)
FLAVORS["small-llava-next"] = VLMConfig(LLAVA, LINED, DECODER, "llava_next", "tiles", TilesConfig(GRIDS[:2]))
FLAVORS["small-onevision"] = VLMConfig(
    dataclasses.replace(ENCODER, image_size=16),
    LINED,
    DECODERS["qwen2"],
    "llava_onevision",
    "tiles",
    TilesConfig(GRIDS, most=1, alone=True),
)
FLAVORS.update(
    {f"small-{name}": VLMConfig(ENCODER, ProjectorConfig(48), decoder) for name, decoder in DECODERS.items()}
)
# Heads of 16 values, which FlexAttention's kernels want.
FLAVORS["small-wide"] = VLMConfig(
    dataclasses.replace(ENCODER, dim=64),
    ProjectorConfig(64),
    dataclasses.replace(DECODERS["qwen3"], head_dim=16),
)


class Tokenizer:
    vocab_size = VOCAB
    specials = {"<|one|>": 5, "<|two|>": 70}
    new_ids = {5, 70}

    def special_id(self, spelling: str) -> int | None:
        return self.specials.get(spelling)


def job_of(changes: dict[str, Any], folder: str) -> VLMJobConfig:
    """`changes`: "section.field" -> value, on top of a float32 run whose layouts can be compared."""
    job = VLMJobConfig()
    job.data.sources = [Source(name=name) for name in SOURCES]
    job.validation.sources = job.data.sources
    base = {
        "job.dump_folder": folder,
        "model.flavor": "small-qwen3",
        "training.seq_len": SEQ_LEN,
        "training.local_batch_size": 1,
        "training.global_batch_size": SLOTS,
        "training.mixed_precision_param": "float32",
        "training.steps": 5,
        "training.loss_chunk_tokens": 24,
        "optimizer.lr": 3e-3,
        # A gradient that is truly zero is noise of 1e-10 here; a smaller eps would make whole updates of it.
        "optimizer.eps": 1e-6,
        "lr_scheduler.warmup_steps": 0,
        "metrics.log_freq": 1,
        "metrics.save_plot": False,
        "data.patches_per_row": PATCHES,
        "data.max_patches_per_image": 48,
        "comm.trace_buf_size": 0,
    }
    for key, value in {**base, **changes}.items():
        section, field = key.split(".")
        assert hasattr(getattr(job, section), field), key
        setattr(getattr(job, section), field, value)
    return job


def weights_of(folder: Path, until: int, **changes: Any) -> dict[str, Tensor]:
    """The whole weights of a run of one process in `folder`, to step `until`; it ends with a checkpoint."""
    job = job_of({"checkpoint.enable": True, **changes}, str(folder))
    try:
        trainer = Trainer(build(job, SMALL, open_process_group(job.comm, folder)))
        while trainer.state.step < until:
            trainer.train_step()
        trainer.save()
        trainer.close()
        return {name: whole(weight) for name, weight in trainer.state.model().items()}
    finally:
        close_process_group()


def draw_slot(seed: int, sizes: Sizes, text_only: bool) -> list[Document]:
    """Documents until one no longer fits; so some slots end in padding."""
    draw = random.Random(seed)
    documents: list[Document] = []
    tokens, rows = 0, [0] * sizes.patch_rows
    while True:
        document: Document = [[draw.randrange(4, VOCAB) for _ in range(draw.choice([1, 3, 9, 14]))]]
        needed = len(document[0])  # type: ignore[arg-type]
        for _ in range(0 if text_only else draw.randrange(3)):
            height, width = draw.choice([(2, 2), (2, 6), (8, 2), (4, 4), (2, 12)])
            cells = sizes.cells(height, width)
            row = next((r for r, used in enumerate(rows) if used + cells <= sizes.patches_per_row), None)
            if row is None:
                continue
            rows[row] += cells
            document += [
                draw_picture(height, width, sizes.patch_size, draw.randrange(10**6)),
                [draw.randrange(4, VOCAB)],
            ]
            needed += height * width // sizes.merge**2 + 1 + sizes.newline
        if tokens + needed > sizes.seq_len:
            return documents
        tokens += needed
        documents.append(document)


def batch_of(slots: list[int], step: int, sizes: Sizes) -> Batch:
    """Those slots of a step's global batch."""
    drawn = [draw_slot(1000 * step + slot, sizes, text_only=slot % 4 == 3) for slot in slots]
    tensors = build_batch(drawn, sizes)
    ids = tensors["document_ids"]
    tensors["source_ids"] = torch.where(ids >= 0, (ids % 3 == 2).int(), -1)
    samples = [
        Delivered(
            row,
            number,
            SOURCES[number % 3 == 2],
            "shard",
            f"{step}/{slots[row]}/{number}",
            image_sizes(document, sizes),
        )
        for row, documents in enumerate(drawn)
        for number, document in enumerate(documents)
    ]
    counts = {
        "tokens": int((tensors["document_ids"] >= 0).sum()),
        "loss_tokens": int((tensors["labels"] >= 0).sum()),
        "patches": int((tensors["grid_thw"][..., 0] >= 0).sum()),
        "images": sum(len(sample.image_sizes) for sample in samples),
    }
    for number, source in enumerate(SOURCES):
        labels = tensors["labels"][tensors["source_ids"] == number]
        counts |= {f"tokens/{source}": len(labels), f"loss_tokens/{source}": int((labels >= 0).sum())}
    return Batch(tensors, counts, samples)


def image_sizes(document: Document, sizes: Sizes) -> list[tuple[int, int]]:
    """In pixels."""
    pictures = [part.size for part in document if isinstance(part, Picture)]
    return [(height * sizes.patch_size, width * sizes.patch_size) for height, width in pictures]


@dataclasses.dataclass
class DrawnStep:
    batches: list[Batch]
    state: dict[str, bytes]

    def once(self) -> Iterator[Batch]:
        return iter(self.batches)


class DrawnLoader:
    """The same global batches whatever the layout: rank r of n owns slots r * G / n and on.

    With data.epochs the steps end, after three for each; what is held out is one step.
    """

    def __init__(self, job: VLMJobConfig, tokenizer: Any, *, rank: int, ranks: int, split: str, **_: Any):
        data, model = job.data, model_config(job)
        rows = job.training.seq_len, data.patches_per_row, data.patch_rows
        encoder = model.encoder
        merge, newline = model.projector.merge_size, model.projector.newline
        mixed = plan_of(model, job).mixes
        self.sizes = Sizes(*rows, encoder.patch_size, merge, encoder.extra_cells, newline, mixed)
        self.total = resolve_batch(job, int(os.environ.get("WORLD_SIZE", "1"))).global_
        each = self.total // ranks
        self.mine = list(range(rank * each, (rank + 1) * each))
        self.local = job.training.local_batch_size
        self.first = 1 if split == "train" else HELD_OUT
        self.steps = (STEPS_AN_EPOCH * data.epochs or HELD_OUT - 1) if split == "train" else 1
        self.given = 0

    def __iter__(self) -> "DrawnLoader":
        return self

    def __next__(self) -> DrawnStep:
        if self.given == self.steps:
            raise StopIteration
        parts = [self.mine[start : start + self.local] for start in range(0, len(self.mine), self.local)]
        batches = [batch_of(part, self.first + self.given, self.sizes) for part in parts]
        self.given += 1
        for batch in batches:
            batch.epochs["drawn"] = self.given * self.local / (STEPS_AN_EPOCH * self.total)
        return DrawnStep(batches, self.state_dict())

    def state_dict(self) -> dict[str, bytes]:
        return {key: str(self.given).encode() for key in self.slot_keys()}

    def load_state_dict(self, state: dict[str, bytes]) -> None:
        (self.given,) = {int(state[key]) for key in self.slot_keys()}

    def slot_keys(self) -> list[str]:
        return [f"slot_{slot:06d}" for slot in self.mine]

    def report(self) -> dict:
        return {"samples": self.given * len(self.mine), "rejected": {"bad": 1}}

    def summary(self, report: dict) -> str:
        return f"{report['rejected']['bad']} of {report['samples']} samples were bad"

    def close(self) -> None:
        pass


def whole(tensor: Tensor) -> Tensor:
    """A copy, on the host."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def check_sizes(job: VLMJobConfig, ranks: int) -> None:
    """What experiments/vlm/check.py checks, but for the data, which is drawn here."""
    config, sizes = model_config(job), degrees(job.parallelism, ranks)
    check_ranges(job, RANGES)
    check_selective(job)
    resolve_batch(job, ranks)
    check_sequence(job, sizes)
    check_pipeline(job, sizes)
    check_patches(job, config)
    check_encoder(job, config.encoder, sizes)
    check_decoder(config.decoder, job, sizes, job.parallelism.pipeline_parallel_encoder_stage)


SMALL = dataclasses.replace(
    SPEC,
    load_tokenizer=lambda job: Tokenizer(),
    build_loader=DrawnLoader,
    missing_data=lambda job: [],
)
CPU = torch.device("cpu")
