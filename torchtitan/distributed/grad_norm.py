"""Norm and clipping of gradients that live on several meshes.

Encoder and decoder are sharded over different meshes, and PyTorch's norm takes one mesh at a time. Here a
rank adds the squares of what it holds, each divided by the number of ranks that hold the same element; one
all-reduce of one number over the world then gives the global norm, on every rank, pipeline stages included.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.distributed.collectives import sum_over_ranks
from torchtitan.distributed.mesh import Mesh, own_part


def _holders(grad: Tensor, ranks_per_stage: int) -> int:
    """How many ranks of a pipeline stage hold the same elements of this gradient."""
    if not isinstance(grad, DTensor):
        return ranks_per_stage
    assert not any(placement.is_partial() for placement in grad.placements), (
        "a gradient whose sum is still due"
    )
    split = [
        grad.device_mesh.size(dim)
        for dim, placement in enumerate(grad.placements)
        if not placement.is_replicate()
    ]
    return ranks_per_stage // math.prod(split)


@torch.no_grad()
def global_norm(parameters: Iterable[nn.Parameter], mesh: Mesh) -> Tensor:
    """The 2-norm of all gradients of all ranks, float32 scalar on the device.

    `parameters` leaves out what another stage counts already (a tied weight's copy).
    """
    ranks_per_stage = dist.get_world_size() // mesh.degrees.pp
    by_holders: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            holders = _holders(parameter.grad, ranks_per_stage)
            by_holders.setdefault(holders, []).append(own_part(parameter.grad))
    total = torch.zeros((), device=mesh.device)
    for holders, grads in by_holders.items():
        norms = torch._foreach_norm(grads, dtype=torch.float32)
        total += torch.stack(norms).square().sum().to(mesh.device) / holders
    return sum_over_ranks(total).sqrt()


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale gradients to a global norm of at most `max_norm`, without asking the device what it is."""
    grads = [own_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not grads:
        return
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, scale.to(grads[0].device))
