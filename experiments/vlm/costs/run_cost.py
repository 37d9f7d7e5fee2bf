"""What a run costs, without running it, as a dry run and the estimate say."""

from dataclasses import dataclass

import torch

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.costs.estimate import estimate
from experiments.vlm.weights.embedding_rows import planned_rows
from torchtitan.config.job import JobConfig
from torchtitan.config.layout import degrees
from torchtitan.tools.hardware import GIB


@dataclass(frozen=True)
class Cost:
    """The cost of a whole run."""

    tokens: int  # of its slots, padding and all
    peak_gib: float  # of tensors, of a rank
    flops: float  # of full slots, on all ranks


def cost_of(job: JobConfig, ranks: int) -> Cost:
    """Raises ConfigError for what does not fit together. Without the tokenizer: as published."""
    assert isinstance(job, VLMJobConfig)
    found = estimate(job, degrees(job.parallelism, ranks), planned_rows(job), torch.cuda.is_available())
    steps = job.training.steps
    tokens = steps * found.batch.global_ * job.training.seq_len
    return Cost(tokens, found.memory.total / GIB, steps * found.flops)
