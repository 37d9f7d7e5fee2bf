"""Folders as the source of a model's weights (components/weights.py)."""

from collections.abc import Collection, Iterable, Mapping

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from torchtitan.components.checkpoint_read import Failure, reason
from torchtitan.config.errors import ConfigError
from torchtitan.models.hf.match import Matched
from torchtitan.models.hf.tensors import FolderReader


class FolderSource:
    """The weights of one folder or several, as they were matched with the model."""

    def __init__(self, matched: Iterable[Matched], fresh: Iterable[str]):
        """`fresh`: parts that no folder gives."""
        self.matched = list(matched)
        self.made = {name: made for found in self.matched for name, made in found.made.items()}
        self.names: Collection[str] = set(self.made)
        self.fresh = list(fresh)

    def read(self, weights: Mapping[str, Tensor]) -> None:
        """Read into shards of the weights. Raises ConfigError on all ranks alike."""
        try:
            dcp.load(dict(weights), storage_reader=FolderReader(self.made), no_dist=not dist.is_initialized())
        except Failure as error:
            raise ConfigError(f"weights were not read: {reason(error)}") from None

    def report(self) -> list[str]:
        """What is taken from where, what is left over and why, what is fresh."""
        lines = [line for found in self.matched for line in found.lines()]
        return lines + [f"{part}: fresh, from debug.seed" for part in self.fresh]
