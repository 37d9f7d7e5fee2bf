"""Muon (Jordan et al., 2024): momentum, then the nearest orthogonal matrix: all directions move alike.

Unusual here: a matrix may be sharded in any way. Where its rows are divided over ranks (FSDP), each rank gets
a different one of the matrices of one shape, whole, orthogonalises it and sends the rows back, so no work is
done twice; where they are divided otherwise (tensor parallel), every rank gathers them. The Newton-Schulz
steps themselves never communicate.

Letters: M matrices of one shape, R rows (out), C columns (in).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan.distributed.mesh import own_part

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pulls singular values to about 1 fastest
STEPS = 5
BATCH_NUMBERS = 1 << 24  # in the matrices that are orthogonalised in one product: 64 MB in float32


def orthogonalise(update_MRC: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of each matrix's SVD, roughly (singular values 0.7 to 1.2), by Newton-Schulz."""
    a, b, c = COEFFICIENTS
    tall = update_MRC.shape[-2] > update_MRC.shape[-1]
    x = update_MRC.to(dtype)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _row_group(x: Tensor) -> dist.ProcessGroup | None:
    """The ranks that the rows of `x` are divided over, if that is all that divides it."""
    if not isinstance(x, DTensor):
        return None
    dims = [
        dim
        for dim, placement in enumerate(x.placements)
        if not placement.is_replicate() and x.device_mesh.size(dim) > 1
    ]
    # A strided shard (FSDP within tensor parallel) is a class of its own.
    plain = len(dims) == 1 and type(x.placements[dims[0]]) is Shard and x.placements[dims[0]] == Shard(0)
    return x.device_mesh.get_group(dims[0]) if plain else None


def _shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of `whole` that this rank holds of `like`."""
    if not isinstance(like, DTensor) or like.to_local().shape == like.shape:
        return whole
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        whole = whole.narrow(dim, start if size else 0, size)
    return whole


def directions_together(updates: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """This rank's shards of the orthogonalised updates, all of one shape; every rank computes all of them."""
    rounded = [update.to(dtype) for update in updates]  # before they travel
    whole_MRC = torch.stack(
        [update.full_tensor() if isinstance(update, DTensor) else update for update in rounded]
    )
    return [
        _shard_of(direction, update)
        for direction, update in zip(orthogonalise(whole_MRC, dtype), rounded, strict=True)
    ]


def directions_apart(updates: list[Tensor], group: dist.ProcessGroup, dtype: torch.dtype) -> list[Tensor]:
    """The same, where rows are divided over `group`: its rank i orthogonalises update i.

    At most as many updates as ranks.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    rows, columns = updates[0].shape
    # Rows of each rank, as torch.chunk deals them; the last ranks may hold none.
    step = -(-rows // ranks)
    held = [min(step, max(0, rows - i * step)) for i in range(ranks)]
    mine = rank < len(updates)
    sent = [held[rank] * columns if i < len(updates) else 0 for i in range(ranks)]
    received = [count * columns if mine else 0 for count in held]
    shards = torch.cat([own_part(update).to(dtype).flatten() for update in updates])
    whole = shards.new_empty(sum(received))
    dist.all_to_all_single(whole, shards, received, sent, group=group)
    if mine:
        whole = orthogonalise(whole.view(1, rows, columns), dtype).flatten()
    dist.all_to_all_single(shards, whole.contiguous(), sent, received, group=group)
    return [shard.view(held[rank], columns) for shard in shards.chunk(len(updates))]


def sent_for_directions(numbers: int, shards: int, tp: int) -> float:
    """Numbers that a rank sends in a step, where it holds `numbers` / `shards` of the matrices, and each of
    `tp` - 1 other ranks as many.
    """
    others = (shards - 1) / shards
    if tp == 1:
        # Rows to the rank that orthogonalises their matrix, and back.
        return 2 * others * numbers / shards
    return numbers * (others + tp - 1)


class Muon(torch.optim.Optimizer):
    """For matrices only. The learning rate is scaled by sqrt(max(1, rows / columns)) for each."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype | None = None,
    ):
        """`dtype` of the Newton-Schulz steps; default: bfloat16 on GPU, float32 on CPU."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):  # the base class allows a closure; nothing here passes one
        """One update of every parameter that has a gradient, in place; sends over the ranks of each shard."""
        for group in self.param_groups:
            for parameters, ranks in _batches(group["params"]):
                updates = [self._nesterov(parameter, group["momentum"]) for parameter in parameters]
                dtype = self.dtype or (torch.bfloat16 if updates[0].is_cuda else torch.float32)
                directions = (
                    directions_apart(updates, ranks, dtype) if ranks else directions_together(updates, dtype)
                )
                for parameter, direction in zip(parameters, directions, strict=True):
                    _move(own_part(parameter), direction, parameter.shape, group["lr"], group["weight_decay"])

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, buffer, momentum)


def _batches(parameters: Iterable[Tensor]) -> Iterator[tuple[list[Tensor], dist.ProcessGroup | None]]:
    """Parameters of one shape and layout, as many as go together, and the ranks that share the work."""
    kinds = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            kinds[parameter.shape, _row_group(parameter)].append(parameter)
    for (shape, ranks), alike in kinds.items():
        size = dist.get_world_size(ranks) if ranks else max(1, BATCH_NUMBERS // shape.numel())
        for first in range(0, len(alike), size):
            yield alike[first : first + size], ranks


def _move(local: Tensor, direction: Tensor, shape: torch.Size, lr: float, weight_decay: float) -> None:
    rows, columns = shape
    local.mul_(1 - lr * weight_decay)
    local.sub_(lr * max(1.0, rows / columns) ** 0.5 * direction.to(local.device, local.dtype))
