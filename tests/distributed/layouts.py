"""Train a few steps under a layout, with the trainer's own code, and say how far it is from one process."""

import contextlib
import dataclasses
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.reference.small_run import CPU, SMALL, check_sizes, job_of, whole
from torchtitan.build import build
from torchtitan.components.optimizer import trainable
from torchtitan.config.check import zero_bubble_works
from torchtitan.distributed.collectives import sum_over_ranks
from torchtitan.train import Trainer


@dataclasses.dataclass(frozen=True)
class Layout:
    name: str
    ranks: int
    changes: dict[str, Any]  # "section.field" -> value, see small_run.job_of

    @property
    def runs(self) -> bool:
        """With the torch that is installed."""
        schedule = self.changes.get("parallelism.pipeline_parallel_schedule", "")
        return zero_bubble_works() or not schedule.endswith("ZeroBubble")


@dataclasses.dataclass
class Measured:
    losses: list[float]  # of each step, global
    by_source: list[float]  # summed over the steps, global
    norms: list[float]
    gradients: dict[str, Tensor]  # of the first step, whole, before clipping
    weights: dict[str, Tensor]  # after the last step, whole
    validation: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Largest differences from one process: relative ones, but for the weights."""

    loss: float
    norm: float
    gradient: float  # of the first step
    worst: str  # the parameter of `gradient`
    weight: float
    validation: float


class Watched(Trainer):
    gradients: dict[str, Tensor] | None = None

    def update(self) -> Tensor:
        if self.gradients is None:
            # Wrappers of checkpointing and compile do not show in the names.
            self.gradients = {
                name: whole(parameter.grad)
                for part in self.run.forward_backward.parts
                for name, parameter in trainable(part)
                if parameter.grad is not None
            }
        return super().update()


def train(
    changes: dict[str, Any],
    ranks: int,
    until: int = 5,
    validate: bool = True,
    folder: str = "",
) -> Measured | None:
    """On each rank of a pool, to step `until`; with checkpoint.enable, from and to a checkpoint in `folder`.

    Rank 0 gives what every rank knows, which has to be the same, and gradients and weights of all stages.
    """
    with contextlib.nullcontext(folder) if folder else tempfile.TemporaryDirectory() as folder:
        job = job_of(changes, folder)
        check_sizes(job, ranks)
        torch._dynamo.reset()
        trainer = Watched(build(job, SMALL, CPU))
        figures = []
        while trainer.state.step < until:
            assert trainer.train_step()
            loss = float(sum_over_ranks(trainer.loss)) / trainer.run.mesh.degrees.tp
            figures.append((loss, float(trainer.grad_norm)))
        by_source = sum_over_ranks(trainer.source_losses.sums_G) / trainer.run.mesh.degrees.tp
        gradients = of_all_stages(trainer, trainer.gradients or {})
        weights = of_all_stages(
            trainer, {name: whole(tensor) for name, tensor in trainer.state.model().items()}
        )
        validation = trainer.run.validator.evaluate() if validate else {}
        if job.checkpoint.enable:
            trainer.save()
        trainer.close()
    require_one_opinion((figures, by_source.tolist(), validation))
    losses, norms = [list(column) for column in zip(*figures, strict=True)] if figures else ([], [])
    if dist.get_rank() != 0:
        return None
    return Measured(losses, by_source.tolist(), norms, gradients, weights, validation)


def of_all_stages(trainer: Trainer, own: dict[str, Tensor]) -> dict[str, Tensor]:
    group = trainer.run.mesh["pp"].get_group()
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, own, group)
    return {name: tensor for part in parts for name, tensor in part.items()}


def require_one_opinion(figures: Any) -> None:
    opinions: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(opinions, figures)
    assert all(opinion == opinions[0] for opinion in opinions), (
        f"global figures differ between ranks: {opinions}"
    )


def compare(measured: Measured, reference: Measured) -> Difference:
    """A gradient's difference is over its own largest element,
    or 1e-3 of the largest of all if that is more.
    """
    for ours, whole_model in (
        (measured.gradients, reference.gradients),
        (measured.weights, reference.weights),
    ):
        assert ours.keys() == whole_model.keys(), ours.keys() ^ whole_model.keys()
    largest = max(float(g.abs().max()) for g in reference.gradients.values())
    each = {
        name: float((measured.gradients[name] - g).abs().max())
        / max(float(g.abs().max()), largest * _floor(name))
        for name, g in reference.gradients.items()
    }
    worst = max(each, key=each.__getitem__)
    return Difference(
        _relative(measured.losses + measured.by_source, reference.losses + reference.by_source),
        _relative(measured.norms, reference.norms),
        each[worst],
        worst,
        max(
            float((measured.weights[name] - weight).abs().max()) for name, weight in reference.weights.items()
        ),
        _relative(
            [measured.validation[k] or 0 for k in reference.validation],
            [v or 0 for v in reference.validation.values()],
        ),
    )


def _floor(name: str) -> float:
    # The same bias on all keys changes no softmax: without rotary embedding its true gradient is zero, and
    # what is there is rounding.
    return 1e-2 if name.startswith("encoder") and name.endswith("wk.bias") else 1e-3


def _relative(found: list[float], expected: list[float]) -> float:
    return max((abs(a - b) / max(abs(b), 1e-6) for a, b in zip(found, expected, strict=True)), default=0.0)
