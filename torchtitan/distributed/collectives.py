"""Small sums over ranks: host numbers, and a scalar of the device."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_hosts(values: Mapping[str, float]) -> dict[str, float]:
    """Each value added over all ranks; the same keys everywhere. It goes through gloo, so the device is not asked to wait.

    Integers stay exact up to 2^53.
    """
    names = sorted(values)
    packed = torch.tensor([values[name] for name in names], dtype=torch.float64)
    dist.all_reduce(packed)
    return dict(zip(names, packed.tolist(), strict=True))


def any_rank(holds: bool) -> bool:
    """Whether it holds on any rank; all of them ask."""
    return sum_over_hosts({"holds": float(holds)})["holds"] > 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """A tensor added over all ranks of the world, on the device; a new tensor."""
    total = value.clone()
    dist.all_reduce(total)
    return total
