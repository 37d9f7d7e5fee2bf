"""One rank without the others: groups and meshes that are only imagined, on the meta device.

The functions that split a model take them for real ones. So running one rank's share of the model alone
(footprint.py) shows what a rank of any layout would hold and send.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

c10d = torch.ops._c10d_functional


class ImaginedGroup:
    """A process group, or a mesh of one dimension, of which only the first rank is there: this one."""

    def __init__(self, name: str, ranks: int):
        self.group_name, self._ranks = name, ranks

    def size(self) -> int:
        """Ranks of the group."""
        return self._ranks

    def get_group(self) -> "ImaginedGroup":
        """Itself: as a mesh it has one dimension."""
        return self

    def get_local_rank(self) -> int:
        """The first rank is the one that is there."""
        return 0

    def collective(self, name: str, x: Tensor) -> Tensor:
        """What this rank gets from the collective `name`; without a name, a view of `x`."""
        match name:
            case "all-gather":
                return c10d.all_gather_into_tensor(x, self._ranks, self.group_name)
            case "reduce-scatter":
                return c10d.reduce_scatter_tensor(x, "sum", self._ranks, self.group_name)
            case "all-to-all":
                parts = [x.shape[0] // self._ranks] * self._ranks
                return c10d.all_to_all_single(x, parts, parts, self.group_name)
            case "all-reduce":
                return c10d.all_reduce(x, "sum", self.group_name)
        return x.view_as(x)


class ImaginedWorld:
    """Stands for the world of a Mesh. `ranks`: of its groups, by name."""

    def __init__(self, ranks: Mapping[str, int]):
        self.ranks = ranks

    def __getitem__(self, name: str) -> ImaginedGroup:
        return ImaginedGroup(name, self.ranks[name])

    def get_local_rank(self, name: str) -> int:
        """The first rank is the one that is there."""
        return 0


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ImaginedGroup, forward: str, backward: str) -> Tensor:
        ctx.group, ctx.collective = group, backward
        return group.collective(forward, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.group.collective(ctx.collective, grad.contiguous()), None, None, None


def through(x: Tensor, group: ImaginedGroup, forward: str = "", backward: str = "") -> Tensor:
    """`x` through one collective, and its gradient through another."""
    return _Through.apply(x.contiguous(), group, forward, backward)
