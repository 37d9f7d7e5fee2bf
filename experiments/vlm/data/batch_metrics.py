"""What a batch counts of itself: every number of Batch.counts, how it is counted in a slot, and how the
trainer shows it.

A new metric of batches is a row of BATCH_METRICS; the trainer's own (times, memory) are in its
components/metrics.py. What each source gave and what was rejected has names of its own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from experiments.vlm.batch import Delivered
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.rejects import REASONS

Views = dict[str, np.ndarray]  # field -> [S], [rows, L, D] or [rows, L, 3]


@dataclass(frozen=True)
class BatchMetric:
    """How one number of a slot is counted, and what is shown of it."""

    of: Callable[[Views, list[Delivered]], int]  # (a finished slot's arrays, the samples in it)
    capacity: Callable[[VLMJobConfig], int] | None = None  # the most that a slot can hold: shown as occupancy
    per_second: bool = False  # shown as a rate
    written: bool = False  # in the sinks alone


BATCH_METRICS: dict[str, BatchMetric] = {
    "patches": BatchMetric(
        lambda views, samples: int((views["grid_thw"][..., 0] >= 0).sum()),
        capacity=lambda job: job.data.patch_rows * job.data.patches_per_row,
    ),
    "tokens": BatchMetric(
        lambda views, samples: int((views["document_ids"] >= 0).sum()),
        capacity=lambda job: job.training.seq_len,
    ),
    "loss_tokens": BatchMetric(lambda views, samples: int((views["labels"] >= 0).sum())),
    "images": BatchMetric(
        lambda views, samples: sum(len(sample.image_sizes) for sample in samples),
        per_second=True,
    ),
}


def count_slot(views: Views, samples: list[Delivered]) -> dict[str, int]:
    """Every number of BATCH_METRICS for a slot that has been filled."""
    return {name: count.of(views, samples) for name, count in BATCH_METRICS.items()}


def count_by_source(sample: Delivered, labels: np.ndarray) -> dict[str, int]:
    """What one sample, or piece of one, adds to the counts of its source. `labels`: one for each token."""
    counted = {
        "samples": int(sample.offset == 0),  # a document in pieces is one sample
        "tokens": len(labels),
        "loss_tokens": int((labels >= 0).sum()),
    }
    return {f"{what}/{sample.source}": count for what, count in counted.items()}


def names_by_source(sources: Iterable[str]) -> list[str]:
    """Counts that each source has of its own, as `count_by_source` names them."""
    sources = list(sources)
    return [f"{what}/{source}" for what in ("samples", "tokens", "loss_tokens") for source in sources]


def rejected_name(reason: str) -> str:
    """The count of samples and images rejected for that reason, a key of REASONS."""
    return f"rejected/{reason}"


def written_names(sources: Iterable[str]) -> tuple[str, ...]:
    """Counts that the sinks get and the console does not."""
    counted = (name for name, count in BATCH_METRICS.items() if count.written)
    return (*counted, *names_by_source(sources), *map(rejected_name, REASONS))
