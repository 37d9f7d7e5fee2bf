"""How a microbatch passes through the model: plainly here, as a pipeline's schedule elsewhere.

The loss is a sum here. `scale`, one over the loss tokens of the whole step, comes from `Trainer.train_step`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchtitan.components.loader import Tensors
from torchtitan.distributed.fsdp import free_gathered

OfBatch = Callable[[nn.Module, Tensors], Tensor]


class ForwardBackward(Protocol):
    """What the trainer asks of a layout: forward, backward and scores of one microbatch."""

    parts: list[nn.Module]  # the model, or this rank's stages of it

    def __call__(self, tensors: Tensors, scale: float | Tensor, last: bool) -> Tensor:
        """Add the gradients of `scale` times the summed loss. Returns that sum and each source's part of it,
        detached, float32 [1 + sources], on the device.

        A rank keeps its shard of the gradients between microbatches. A rank that computes no loss returns
        zero.
        """
        ...

    def score(self, tensors: Tensors) -> Tensor:
        """(nll, correct) of each label, float32 [B, S, 2], whole slots, alike on all ranks that hold them."""
        ...

    def copies(self) -> list[nn.Parameter]:
        """Parameters that another stage holds and counts: a weight that ties the ends of a pipeline."""
        ...


class Plain:
    """The whole model on this rank."""

    def __init__(self, model: nn.Module, loss: OfBatch, score: OfBatch):
        assert isinstance(model, FSDPModule), "a layout ends with fully_shard of the whole model"
        self.model, self._loss, self._score = model, loss, score
        self.parts: list[nn.Module] = [model]

    def __call__(self, tensors: Tensors, scale: float | Tensor, last: bool) -> Tensor:
        # Shards are summed every time, so that whole gradients are never kept; copies of a shard (HSDP) only
        # once.
        self.model.set_requires_all_reduce(last)
        self.model.set_is_last_backward(last)
        loss = self._loss(self.model, tensors)
        (loss[:1] * scale).sum().backward()
        return loss.detach()

    @torch.no_grad()
    def score(self, tensors: Tensors) -> Tensor:
        """See ForwardBackward."""
        self.model.eval()
        try:
            return self._score(self.model, tensors)
        finally:
            self.model.train()
            free_gathered(self.model)

    def copies(self) -> list[nn.Parameter]:
        """None: each weight is on this rank once."""
        return []
