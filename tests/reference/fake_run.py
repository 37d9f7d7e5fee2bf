"""A whole training run without files: a tiny VLM and a loader that draws its slots from numbers.

python -m tests.reference.fake_run --job.dump_folder X --training.steps 8 ...
"""

import dataclasses
import os
import random
import signal
import sys
from typing import Any

import torch

from experiments.__main__ import in_one_line
from experiments.vlm.batch import Batch, Delivered
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.flavors import ProjectorConfig, VLMConfig
from experiments.vlm.model.vlm import VLM
from experiments.vlm.spec import SPEC
from tests.reference.batches import Sizes, build_batch, draw_picture
from tests.reference.models import ENCODER, QWEN2, QWEN3, VOCAB
from torchtitan.config.layout import resolve_batch
from torchtitan.config.parse import parse

SIZES = Sizes(seq_len=48, patches_per_row=64)
STEPS_OF_DATA, STEPS_OF_AN_EPOCH = 1000, 3


def fake_job(folder: str, **sections: dict[str, Any]) -> VLMJobConfig:
    """A job that fits the fakes; `sections` overrides fields, section by section."""
    job = VLMJobConfig()
    job.job.dump_folder = str(folder)
    job.data.patches_per_row, job.data.max_patches_per_image, job.data.patch_size = SIZES.patches_per_row, 32, SIZES.patch_size
    job.training.seq_len, job.training.local_batch_size, job.training.steps = SIZES.seq_len, 2, 4
    job.training.mixed_precision_param = "float32"
    job.lr_scheduler.warmup_steps = 0
    # A larger eps: where a gradient is next to nothing, AdamW would make noise as large as signal.
    job.optimizer.eps, job.metrics.log_freq, job.metrics.save_plot = 1e-6, 1, False
    for section, fields in sections.items():
        for name, value in fields.items():
            assert hasattr(getattr(job, section), name)
            setattr(getattr(job, section), name, value)
    return job


def draw_slot(slot: int, number: int) -> list:
    """Documents of a slot at its `number`-th step: a copy task, so that a loss can fall; every fifth slot holds text alone."""
    dice = random.Random(f"{slot}/{number}")
    word = dice.randrange(4, VOCAB - 8)
    text = [word + i % 4 for i in range(dice.randrange(5, 20))]
    if slot % 5 == 4:
        return [[text], [text[::-1]]]
    height, width = dice.choice([(2, 4), (4, 4), (2, 8)])
    return [[text[:3], draw_picture(height, width, SIZES.patch_size, dice.randrange(1000)), text], [text[::-1]]]


def draw_batch(slots: list[int], number: int) -> Batch:
    tensors = build_batch([draw_slot(slot, number) for slot in slots], SIZES)
    grid = tensors["grid_thw"]
    counts = {
        "tokens": int((tensors["document_ids"] >= 0).sum()),
        "loss_tokens": int((tensors["labels"] >= 0).sum()),
        "patches": int((grid[..., 0] >= 0).sum()),
        "images": int(((grid[..., 0] >= 0) & (grid[..., 1] == 0) & (grid[..., 2] == 0)).sum()),
    }
    samples = [Delivered(slot, row, 0, "fake", "shard", f"{slot}/{number}", [(16, 64)]) for row, slot in enumerate(slots)]
    return Batch(tensors, counts, samples)


@dataclasses.dataclass
class FakeStep:
    batches: list[Batch]
    state: dict[str, bytes]


class FakeLoader:
    def __init__(self, job: VLMJobConfig, tokenizer: Any, *, rank: int, ranks: int, split: str, control: str | None, agree: Any):
        sizes = resolve_batch(job, int(os.environ.get("WORLD_SIZE", "1")))
        self.B = job.training.local_batch_size
        self.steps = 2 if split == "validation" else STEPS_OF_AN_EPOCH * job.data.epochs or STEPS_OF_DATA
        # A validation step is one forward; its slots are other ones than those of training.
        self.total = sizes.global_ if split == "train" else self.B * ranks
        own = self.total // ranks
        self.slots = list(range(rank * own, rank * own + own))
        self.offset = 0 if split == "train" else 10_000
        self.number = 0

    def __iter__(self):
        return self

    def __next__(self) -> FakeStep:
        if self.number == self.steps:
            raise StopIteration
        groups = [self.slots[i : i + self.B] for i in range(0, len(self.slots), self.B)]
        batches = [draw_batch(group, self.number + self.offset) for group in groups]
        self.number += 1
        for batch in batches:
            batch.epochs["fake"] = self.number * self.B / (STEPS_OF_AN_EPOCH * self.total)
        return FakeStep(batches, self.state_dict())

    def slot_keys(self) -> list[str]:
        return [f"slot_{slot:06d}" for slot in self.slots]

    def state_dict(self) -> dict[str, bytes]:
        return {key: str(self.number).encode() for key in self.slot_keys()}

    def load_state_dict(self, state: dict[str, bytes]) -> None:
        (self.number,) = {int(state[key]) for key in self.slot_keys()}

    def report(self) -> dict:
        return {"samples": self.number * len(self.slots), "rejected": {"bad": 1}}

    def summary(self, report: dict) -> str:
        return f"{report['rejected']['bad']} of {report['samples']} samples were bad"

    def close(self) -> None:
        pass


def fake_model(job: VLMJobConfig, tokenizer: Any) -> VLM:
    """Tied embeddings with the flavor `tied`."""
    decoder = QWEN2 if job.model.flavor == "tied" else QWEN3
    with torch.device("meta"):
        return VLM(VLMConfig(ENCODER, ProjectorConfig(56), decoder), VOCAB, 2, "sdpa", job.training.loss_chunk_tokens)


FAKE = dataclasses.replace(
    SPEC,
    load_tokenizer=lambda job: None,
    build_model=fake_model,
    build_loader=FakeLoader,
    sources=lambda job: ("fake",),
    aliases=lambda job: {"decoder.output.weight": "decoder.tok_embeddings.weight"} if job.model.flavor == "tied" else {},
)


ACCIDENTS = {"KILL": [signal.SIGKILL], "TERM": [signal.SIGTERM], "INT": [signal.SIGINT], "INT_TWICE": [signal.SIGINT] * 2}


def main(argv: list[str]) -> int:
    """KILL_AFTER=n in the environment: SIGKILL before step n + 1; the other ACCIDENTS likewise; FAIL_AFTER=n: an error then.

    ACCIDENT_RANK: the one rank that gets the signals; without it all do. Returns the exit code.
    """
    from torchtitan import train
    from torchtitan.tools.logging import init_logger

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    init_logger()
    options = parse(argv, {"vlm": VLMJobConfig})
    job = fake_job(options.job.dump_folder)
    given = {argument.removeprefix("--").removeprefix("no-") for argument in argv if argument.startswith("--")}
    for key in given:
        section, name = key.split(".")
        name = name.removeprefix("no_")
        setattr(getattr(job, section), name, getattr(getattr(options, section), name))

    plain_step, rank = train.Trainer.train_step, os.environ.get("RANK", "0")

    def step_with_accident(self) -> bool:
        for name, numbers in ACCIDENTS.items():
            now = os.environ.get(f"{name}_AFTER") == str(self.state.step)
            for number in numbers if now and os.environ.get("ACCIDENT_RANK", rank) == rank else ():
                os.kill(os.getpid(), number)
        assert os.environ.get("FAIL_AFTER") != str(self.state.step), "an accident"
        return plain_step(self)

    train.Trainer.train_step = step_with_accident  # type: ignore[method-assign]
    return in_one_line(lambda: train.main(job, FAKE))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
