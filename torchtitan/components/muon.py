"""Muon (Jordan et al., 2024): momentum, then the nearest orthogonal matrix, so that every direction moves equally far.

Unusual here: a matrix may be sharded in any way (FSDP, tensor parallel, both). Its update is gathered once, orthogonalised
whole, and each rank keeps its shard: the Newton-Schulz steps themselves do not communicate. Matrices of one shape are
orthogonalised in one batched product.

Letters: M matrices of one shape, R rows (out), C columns (in).
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pulls singular values to about 1 fastest
STEPS = 5


def orthogonalise(update_MRC: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of each matrix's singular value decomposition, roughly (singular values 0.7 to 1.2), by Newton-Schulz."""
    a, b, c = COEFFICIENTS
    tall = update_MRC.shape[-2] > update_MRC.shape[-1]
    x = update_MRC.to(dtype)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of `whole` that this rank holds of `like`."""
    if not isinstance(like, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        whole = whole.narrow(dim, start if size else 0, size)
    return whole


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


class Muon(torch.optim.Optimizer):
    """For matrices only. The learning rate is scaled by sqrt(max(1, rows / columns)) for each."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float, dtype: torch.dtype | None = None):
        """`dtype` of the Newton-Schulz steps; default: bfloat16 on GPU, float32 on CPU, where bfloat16 gains nothing."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):  # the base class allows a closure; nothing here passes one
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step_of_one_shape(parameters, group)

    def _step_of_one_shape(self, parameters: list[Tensor], group: dict) -> None:
        update_MRC = torch.stack([_whole(self._nesterov(parameter, group["momentum"])) for parameter in parameters])
        default = torch.bfloat16 if update_MRC.is_cuda else torch.float32
        direction_MRC = orthogonalise(update_MRC, self.dtype or default)
        rows, columns = update_MRC.shape[1:]
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        for parameter, direction in zip(parameters, direction_MRC, strict=True):
            local = _local(parameter)
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.sub_(rate * _shard_of(direction, parameter).to(local.device, local.dtype))

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, buffer, momentum)
