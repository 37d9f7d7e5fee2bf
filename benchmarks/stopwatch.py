"""How long each part of a step takes on the device, without making it wait: events between the parts, read
once the step is over.

An event lies where the residual stream, or its gradient in the backward pass, goes from one part to the next.
What happens on the host alone is not seen.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchtitan.components.loader import Tensors

PARTS = ("copy", "encoder", "projector", "embeddings", "decoder", "output layer", "optimizer")


class _Passing(torch.autograd.Function):
    """The same tensor; its gradient ends a part."""

    @staticmethod
    def forward(ctx, x, watch, part):
        ctx.watch, ctx.part = watch, part
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.watch.ends(ctx.part)
        return gradient, None, None


class Stopwatch:
    """Times the parts of a whole model of experiments/vlm on one device. Blocks may be compiled; the step may
    not be graphed.

    `first`: where its backward pass ends; of text alone "embeddings".
    """

    def __init__(self, model: Any, device: torch.device, first: str = "encoder"):
        self.device, self.first = device, first
        self.events: list[tuple[str, torch.cuda.Event | float]] = []
        model.encoder.register_forward_pre_hook(lambda *_: self.ends("copy"))
        self._after(model.encoder, "encoder", "projector")
        self._after(model.projector, "projector", "embeddings")
        # not of its layers, whose hooks would be compiled with them
        self._before(model.decoder, "embeddings", "decoder")
        self._before(model.decoder.norm, "decoder", "output layer")
        model.decoder.register_forward_hook(lambda *_: self.ends("output layer"))

    def _before(self, module: nn.Module, forward: str, backward: str) -> None:
        module.register_forward_pre_hook(
            lambda _, inputs: (self._passing(inputs[0], forward, backward), *inputs[1:])
        )

    def _after(self, module: nn.Module, forward: str, backward: str) -> None:
        module.register_forward_hook(lambda _, __, result: self._passing(result, forward, backward))

    def _passing(self, x: Tensor, forward: str, backward: str) -> Tensor:
        self.ends(forward)
        return _Passing.apply(x, self, backward)

    def start(self) -> None:
        """Begin a step, and forget the one before."""
        self.events = []
        self.ends("")

    def ends(self, part: str) -> None:
        """What the device was given since the last call was of this part."""
        if self.device.type != "cuda":
            self.events.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append((part, event))

    def between(self, microbatches: Iterable[Tensors]) -> Iterator[Tensors]:
        """The same; the backward pass of each ends in the first part."""
        for tensors in microbatches:
            yield tensors
            self.ends(self.first)

    def seconds(self) -> dict[str, float]:
        """Seconds of each part of the step since `start`. Waits for the device."""
        found = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, event) in zip(self.events, self.events[1:], strict=False):
            if isinstance(before, torch.cuda.Event) and isinstance(event, torch.cuda.Event):
                event.synchronize()
                found[part] += before.elapsed_time(event) / 1000
            elif isinstance(before, float) and isinstance(event, float):
                found[part] += event - before
        return found
