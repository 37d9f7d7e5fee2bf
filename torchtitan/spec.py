"""What a model brings to the trainer, which knows nothing of images, towers or what a token means."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from torchtitan.components.checkpoint_read import Sizes
from torchtitan.components.forward_backward import ForwardBackward
from torchtitan.components.loader import Loader, Tensors
from torchtitan.components.metrics import Counts
from torchtitan.components.validation import Scoring, Tasks
from torchtitan.components.weights import WeightSource
from torchtitan.config.layout import Degrees
from torchtitan.distributed.estimate import Memory
from torchtitan.distributed.mesh import Mesh


class Model(Protocol):
    """What the trainer needs of a model, besides its being an nn.Module."""

    ADAMW_ONLY: tuple[str, ...]  # matrices that Muon leaves to AdamW, by the beginning of their names

    TOKEN_TABLES: tuple[str, ...]  # names of the parameters that have a row for each token

    def init_weights(self, seed: int, without: Collection[str] = ()) -> None:
        """In place and the same under every layout; parameters have storage by then. `without`: names of
        those that get their values elsewhere.
        """
        ...

    def tied_names(self) -> dict[str, str]:
        """Parameter -> the name that it is stored under, where two are one."""
        ...


@dataclass(frozen=True)
class TrainSpec:
    """The trainer divides a step's loss by the sum of its weights over all ranks and microbatches.

    These weights are a count of the batch, an integer or not, that the host knows before the forward
    (Counts.loss_weight).
    """

    name: str
    parts: tuple[str, ...]  # attributes of the model, in order of forward
    load_tokenizer: Callable[[Any], Any]  # (job)
    # (job, tokenizer; None: as published): a Model, on the meta device
    build_model: Callable[[Any, Any], Any]
    model_config: Callable[[Any], Any]  # (job): a dataclass of sizes, stored with the weights
    # (job, shapes of the whole model's weights): published weights, compared with those shapes
    initial_weights: Callable[[Any, Sizes], WeightSource | None]
    # (job, checkpoint, folder, rank, ranks): the share of a rank in the checkpoint as a Hugging Face folder
    export: Callable[[Any, Path, Path, int, int], object]
    # (job, layout, tokenizer or None, on a GPU?): bytes of a rank at the peak; after fit_memory
    memory: Callable[[Any, Degrees, Any, bool], Memory]
    # (job, layout, tokenizer): write into the job what its memory budget chooses; raises ConfigError
    fit_memory: Callable[[Any, Degrees, Any], None]
    parallelize: Callable[[Any, Mesh, Any], None]  # (model, mesh, job): in place
    # (model, mesh, job): in place of parallelize
    pipeline: Callable[[Any, Mesh, Any], ForwardBackward] | None
    # (job, tokenizer, *, rank, ranks, split, control, agree, group): see components/loader.py
    build_loader: Callable[..., Loader]
    # (job, tokenizer, rank, ranks): validation.tasks, whose records these ranks share; None: there are none
    open_tasks: Callable[[Any, Any, int, int], Tasks | None]
    # (job): a line for each path of data that is not on this machine
    missing_data: Callable[[Any], list[str]]
    # (host tensors, mesh, job): the share of this rank of a CP group
    shard_batch: Callable[[Tensors, Mesh, Any], Tensors]
    # weighted sum over what this rank has of a batch, then what each source (Counts.sources) has of it;
    # float32 [1 + sources]
    loss: Callable[[nn.Module, Tensors], Tensor]
    # (nll, correct) of each label, float32 [B, S, 2], 0 where none; whole slots on every rank of a CP group
    score: Callable[[nn.Module, Tensors, Mesh], Tensor]
    scoring: Scoring
    counts: Callable[[Any], Counts]  # (job)
    # (job, model): useful FLOPs of a batch, forward and backward
    flops: Callable[[Any, Any], Callable[[Any], int]]
