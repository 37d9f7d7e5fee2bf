"""Train a few steps under a layout, with the trainer's own code, and say how far it is from one process."""

import dataclasses
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed.world import TEST_SPEC, check_sizes, device, job_of
from torchtitan.build import build
from torchtitan.components.optimizer import trainable
from torchtitan.config.check import zero_bubble_works
from torchtitan.distributed.collectives import sum_over_ranks
from torchtitan.train import Trainer


@dataclasses.dataclass(frozen=True)
class Layout:
    name: str
    ranks: int
    changes: dict[str, Any]  # "section.field" -> value, see world.job_of

    @property
    def runs(self) -> bool:
        """With the torch that is installed."""
        schedule = self.changes.get("parallelism.pipeline_parallel_schedule", "")
        return zero_bubble_works() or not schedule.endswith("ZeroBubble")


@dataclasses.dataclass
class Measured:
    losses: list[float]  # of each step, global
    norms: list[float]
    gradients: dict[str, Tensor]  # of the first step, whole, before clipping
    validation: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Largest relative differences from one process."""

    loss: float
    norm: float
    gradient: float  # of the first step
    worst: str  # the parameter of `gradient`
    validation: float


class Watched(Trainer):
    gradients: dict[str, Tensor] | None = None

    def update(self) -> Tensor:
        if self.gradients is None:
            # Wrappers of checkpointing and compile do not show in the names.
            self.gradients = {
                name: whole(parameter.grad).clone()
                for part in self.run.passes.parts
                for name, parameter in trainable(part)
                if parameter.grad is not None
            }
        return super().update()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(changes: dict[str, Any], ranks: int, steps: int = 5, validate: bool = True) -> Measured | None:
    """On each rank of a pool. What every rank knows comes from rank 0; the gradients are those of all pipeline stages."""
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(changes, folder)
        check_sizes(job, ranks)
        torch._dynamo.reset()
        trainer = Watched(build(job, TEST_SPEC, device()))
        losses, norms = [], []
        for _ in range(steps):
            assert trainer.train_step()
            losses.append(float(sum_over_ranks(trainer.loss)) / trainer.run.mesh.degrees.tp)
            norms.append(float(trainer.grad_norm))
        gradients = _of_all_stages(trainer)
        validation = trainer.run.validator.evaluate() if validate else {}
        trainer.close()
        return Measured(losses, norms, gradients, validation) if dist.get_rank() == 0 else None


def _of_all_stages(trainer: Watched) -> dict[str, Tensor]:
    assert trainer.gradients is not None
    group = trainer.run.mesh["pp"].get_group()
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, trainer.gradients, group)
    return {name: gradient for part in parts for name, gradient in part.items()}


def compare(measured: Measured, reference: Measured) -> Difference:
    """A gradient's difference is over its own largest element, or 1e-3 of the largest of all where that is more."""
    assert measured.gradients.keys() == reference.gradients.keys(), measured.gradients.keys() ^ reference.gradients.keys()
    largest = max(float(g.abs().max()) for g in reference.gradients.values())
    each = {
        name: float((measured.gradients[name] - g).abs().max()) / max(float(g.abs().max()), largest * _floor(name))
        for name, g in reference.gradients.items()
    }
    worst = max(each, key=each.__getitem__)
    return Difference(
        _relative(measured.losses, reference.losses),
        _relative(measured.norms, reference.norms),
        each[worst],
        worst,
        _relative([measured.validation[k] or 0 for k in reference.validation], [v or 0 for v in reference.validation.values()]),
    )


def _floor(name: str) -> float:
    # The same bias on all keys changes no softmax: without rotary embedding its true gradient is zero, and what is there is rounding.
    return 1e-2 if name.startswith("encoder") and name.endswith("wk.bias") else 1e-3


def _relative(found: list[float], expected: list[float]) -> float:
    return max((abs(a - b) / max(abs(b), 1e-6) for a, b in zip(found, expected, strict=True)), default=0.0)
