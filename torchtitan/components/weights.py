"""Weights of a model that is laid out over ranks: their names, storage, and where values come from."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from torchtitan.components.checkpoint_read import PREFIX, Sizes, reading, require_sizes, stored_sizes
from torchtitan.tools.logging import logger


class WeightSource(Protocol):
    """Where a model's weights come from, compared with the model before anything was made."""

    names: Collection[str]  # of the weights that it has; the others are made fresh

    def read(self, weights: Mapping[str, Tensor]) -> None:
        """Read into these weights, which are shards. All ranks read together."""
        ...

    def report(self) -> list[str]:
        """Lines for people: what is taken from where, and what is not."""
        ...


class CheckpointSource:
    """The weights of a training checkpoint, all of them."""

    def __init__(self, path: Path, shapes: Sizes):
        """Raises ConfigError where the checkpoint is of another model, or damaged."""
        self.path = path
        self.names: Collection[str] = set(shapes)
        require_sizes({PREFIX + name: shape for name, shape in shapes.items()}, stored_sizes(path))

    def read(self, weights: Mapping[str, Tensor]) -> None:
        """Raises Damaged."""
        with reading(self.path):
            dcp.load(
                {PREFIX + name: tensor for name, tensor in weights.items()}, checkpoint_id=str(self.path)
            )

    def report(self) -> list[str]:
        """One line."""
        return [f"weights of {self.path}"]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a whole model's weights, on any device; tied ones are there once, under the stored name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def stored_name(name: str, tied: Mapping[str, str]) -> str:
    """The name that a parameter is stored under. `tied`: parameter -> that name, where it is another's."""
    for alias, stored in tied.items():
        if name == alias or name.startswith(alias + "."):
            return stored + name[len(alias) :]
    return name


def named_weights(parts: list[nn.Module], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """References to the weights of this rank's parts, by the name that each is stored under."""
    weights: dict[str, Any] = {
        name: tensor for part in parts for name, tensor in get_model_state_dict(part).items()
    }
    return {stored_name(name, tied): tensor for name, tensor in weights.items()}


def to_empty(parts: list[nn.Module], device: torch.device | str) -> None:
    """Give each rank storage for its shards alone."""
    for part in parts:
        part.to_empty(device=device)


def fill(
    parts: list[nn.Module], tied: Mapping[str, str], seed: int, source: WeightSource | None = None
) -> None:
    """Give values to parts that have storage: those of `source`, the rest initial ones from `seed`."""
    for part in parts:
        part.init_weights(seed, without=source.names if source else ())  # type: ignore[operator]
    if source:
        weights = named_weights(parts, tied)
        source.read({name: tensor for name, tensor in weights.items() if name in source.names})
        for line in source.report():
            logger.info(line)
