"""One rank without the others: groups and meshes that are only imagined, on the meta device.

What splits a model takes them for real ones, so what a rank of any layout would hold is seen by running its share of the
model alone; what it would send is counted here.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

c10d = torch.ops._c10d_functional


class ImaginedGroup:
    """A process group, or a mesh of one dimension, of which this is the first rank and the only one that is there."""

    def __init__(self, name: str, ranks: int, sent: dict[str, float]):
        """`sent`: bytes that this rank sent, by group and collective; shared by all groups of a world."""
        self.group_name, self.ranks, self._sent = name, ranks, sent

    def size(self) -> int:
        return self.ranks

    def get_group(self) -> "ImaginedGroup":
        return self

    def get_local_rank(self) -> int:
        return 0

    def collective(self, name: str, x: Tensor) -> Tensor:
        """What this rank gets of the collective `name`; of none, a view of `x`."""
        ranks, others = self.ranks, 1 - 1 / self.ranks
        match name:
            case "all-gather":
                sent, out = ranks - 1.0, c10d.all_gather_into_tensor(x, ranks, self.group_name)
            case "reduce-scatter":
                sent, out = others, c10d.reduce_scatter_tensor(x, "sum", ranks, self.group_name)
            case "all-to-all":
                parts = [x.shape[0] // ranks] * ranks
                sent, out = others, c10d.all_to_all_single(x, parts, parts, self.group_name)
            case "all-reduce":
                sent, out = 2 * others, c10d.all_reduce(x, "sum", self.group_name)
            case _:
                return x.view_as(x)
        self._sent[f"{self.group_name} {name}"] += sent * x.numel() * x.element_size()
        return out


class ImaginedWorld:
    """Stands for the world of a Mesh: its dimensions by name."""

    def __init__(self, degrees: Any):
        self.sent: dict[str, float] = defaultdict(float)
        self._degrees = degrees

    def __getitem__(self, name: str) -> ImaginedGroup:
        return ImaginedGroup(name, getattr(self._degrees, name), self.sent)

    def get_local_rank(self, name: str) -> int:
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
