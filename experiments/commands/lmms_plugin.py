"""Our models in lmms-eval, by its entry points `lmms_eval.models` (pyproject.toml): docs/lmms_eval.md.

    lmms_eval --model torchtitan_vlm --model_args pretrained=FOLDER --tasks ai2d --batch_size 8

What stands in --model_args is an option of the commands or of the trainer, as `checkpoint=step-500` or
`data.max_patches_per_image=256`. Imports lmms_eval, and so is imported by it alone.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from experiments.commands.model_options import ModelOptions, model_job, open_model
from experiments.vlm.data.formats.record_shard import ImageValues
from experiments.vlm.evaluate.lmms_requests import LmmsRequests
from torchtitan.config.errors import require
from torchtitan.config.layout import degrees
from torchtitan.distributed.process_group import world_size
from torchtitan.tools.logging import init_logger


def manifest() -> ModelManifest:
    """What the entry point gives."""
    return ModelManifest(
        "torchtitan_vlm",
        simple_class_path=f"{__name__}.SimpleModel",
        chat_class_path=f"{__name__}.ChatModel",
    )


@dataclass
class Options(ModelOptions):
    """Options of --model_args that are not the trainer's; pretrained=FOLDER stands for one of --hf and
    --job.dump_folder.
    """

    max_tokens: int = 1024  # room for an answer, after training.seq_len tokens for its prompt
    by_token: bool = True  # a choice is as likely as the mean of its tokens; off: as all of them together


class SimpleModel(lmms):
    """Answers questions whose images stand in their text, or before it; weighs choices."""

    is_simple = True

    def __init__(
        self,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **model_args: Any,
    ):
        """batch_size: how many are answered at one time. Raises UserError."""
        super().__init__()
        init_logger(sys.stderr)
        fine = str(batch_size).isdecimal() and int(batch_size) > 0
        require(fine, f"--batch_size {batch_size}: give a number")
        require(max_batch_size is None, "--max_batch_size: leave it out, --batch_size is what is taken")
        options, job = model_job(as_argv(model_args), Options, __doc__)
        split = degrees(job.parallelism, world_size()).tp
        require(
            split == 1,
            f"parallelism.tensor_parallel_degree = {split}: each process of lmms-eval has questions of its "
            "own; use 1",
        )
        answering = open_model(options, job, int(batch_size), options.max_tokens)
        self.device = answering.engine.cache.device  # where lmms-eval's own tensors are to be
        require(
            device is None or torch.device(device).type == self.device.type,
            f"--device {device}: this process has {self.device}; leave it out",
        )
        images = ImageValues("/", job.data)
        self.requests = LmmsRequests(answering, images, self._document, chat=not self.is_simple)
        self.by_token = options.by_token
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer to each."""
        return [said[0] for said in self.requests.said(requests, several=False)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of each conversation, whose questions may follow from them."""
        return self.requests.said(requests, several=True)

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """(loss, greedy) of each: whatever its name says, the least is what the metrics choose."""
        # A plain pair becomes its text on the way to them (0.7.3), one in here does not.
        return [GenerationResult(pair) for pair in self.requests.losses(requests, self.by_token)]

    def clean(self) -> None:
        """Nothing more is asked: what the model takes is free for a judge."""
        del self.requests
        super().clean()

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]


class ChatModel(SimpleModel):
    """Answers messages whose images stand where the task puts them."""

    is_simple = False


def as_argv(model_args: Mapping[str, Any]) -> list[str]:
    """The command line that --model_args stands for."""
    argv = []
    for name, value in model_args.items():
        if name == "pretrained":
            name = "hf" if (Path(value) / "config.json").is_file() else "job.dump_folder"
        if isinstance(value, bool):
            section, dot, field = name.rpartition(".")
            argv.append(f"--{section}{dot}{'' if value else 'no_'}{field}")
        else:
            argv += [f"--{name}", str(value)]
    return argv
