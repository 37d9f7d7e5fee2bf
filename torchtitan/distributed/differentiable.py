"""Collectives that gradients flow through.

The only place that imports PyTorch's functional collectives, which are half private.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional

from torchtitan.distributed.imagined import ImaginedGroup, through

Group = ProcessGroup | ImaginedGroup

# Renamed in torch 2.13; the old name warns there.
_all_gather = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """Every rank's `x` side by side along `dim`, in rank order.

    Backward: each rank gets the sum of what all ranks found for its part.
    """
    if isinstance(group, ImaginedGroup):
        whole = through(x, group, "all-gather", "reduce-scatter")
    else:
        whole = _all_gather(x.contiguous(), gather_dim=0, group=group)
    # Along another dimension torch 2.12 calls a function that torch.compile refuses to trace.
    return torch.cat(whole.split(x.shape[0]), dim) if dim else whole


def exchange(x: Tensor, group: Group) -> Tensor:
    """All-to-all: part i of dimension 0 goes to rank i, and part i of the result came from rank i.

    Backward is the same again.
    """
    if isinstance(group, ImaginedGroup):
        return through(x, group, "all-to-all", "all-to-all")
    return functional.all_to_all_single_autograd(x.contiguous(), None, None, group)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_gradient(x: Tensor, group: Group) -> Tensor:
    """`x` unchanged, which all ranks hold and each uses in part.

    Backward: the sum of the gradients that they found.
    """
    if isinstance(group, ImaginedGroup):
        return through(x, group, backward="all-reduce")
    return _SumGradient.apply(x, group)
