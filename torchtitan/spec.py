"""What a model brings to the trainer. The trainer itself knows nothing of images, towers or what a token means."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchtitan.components.forward_backward import ForwardBackward
from torchtitan.components.loader import Loader, Tensors
from torchtitan.config.layout import Degrees
from torchtitan.distributed.estimate import Memory
from torchtitan.distributed.mesh import Mesh


@dataclass(frozen=True)
class TrainSpec:
    name: str
    parts: tuple[str, ...]  # attributes of the model that training.freeze may name
    load_tokenizer: Callable[[Any], Any]  # (job)
    # (job, tokenizer; None: as published): on the meta device; it has init_weights(seed)
    build_model: Callable[[Any, Any], Any]
    # (job, layout, tokenizer or None, on a GPU?): bytes of a rank at the peak
    memory: Callable[[Any, Degrees, Any, bool], Memory]
    parallelize: Callable[[Any, Mesh, Any], None]  # (model, mesh, job): in place
    pipeline: Callable[[Any, Mesh, Any], ForwardBackward] | None  # (model, mesh, job): in place of parallelize
    build_loader: Callable[..., Loader]  # (job, tokenizer, *, rank, ranks, split, control, agree): see components/loader.py
    shard_batch: Callable[[Tensors, Mesh, Any], Tensors]  # (host tensors, mesh, job): the share of this rank of a CP group
    loss: Callable[[nn.Module, Tensors], Tensor]  # summed loss, float32 [1]
    score: Callable[[nn.Module, Tensors, Mesh], Tensor]  # (nll, correct) of each label of whole slots, float32 [B, S, 2]; 0 where none
    loss_weight: str  # the count that a step's summed loss is divided by
    tokens: str  # the count that tps speaks of
    capacity: Callable[[Any], dict[str, int]]  # (job): the most that a slot can hold of some counts; printed as occupancy
    rates: tuple[str, ...]  # counts that are printed per second
    tallies: Callable[[Any], tuple[str, ...]]  # (job): counts that are written to the sinks, and not printed
    sources: Callable[[Any], tuple[str, ...]]  # (job): names of what a batch gives its epochs of
    flops: Callable[[Any, Any], Callable[[Any], int]]  # (job, model): useful FLOPs of a batch, forward and backward
    adamw_only: tuple[str, ...]  # matrices that Muon leaves to AdamW, by the beginning of their names
    aliases: Callable[[Any], dict[str, str]]  # (job): parameter -> the name it is stored under, where two are one (tied)
    documents: str  # field of a batch that tells documents apart, for the share of them that is exact
    labels: str  # field that holds the labels; negative where there is none
    groups: dict[str, Callable[[Any], bool]]  # name -> is this sample in it: breakdowns of validation

    def counts(self, job: Any) -> list[str]:
        """The counts of a batch that the trainer adds up over ranks."""
        return sorted({self.loss_weight, self.tokens, *self.rates, *self.capacity(job), *self.tallies(job)})
