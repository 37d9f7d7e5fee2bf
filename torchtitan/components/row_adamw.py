"""AdamW for a few rows of a table; the others stay as they are, bit for bit.

Unusual here: the table may be divided over ranks by its rows, in any way. Every rank gets the gradients of
the few, keeps their moments, K rows of them, and moves those that it holds. They are not decayed, since the
other rows are not either.

Letters: K rows that train, D width.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan.distributed.mesh import own_part


class HeldRows:
    """Which of a table's few rows a rank holds, and where."""

    def __init__(self, table: Tensor, rows: Sequence[int]):
        self.count = len(rows)
        first, size, self.groups = _rows_held(table)
        here = [(k, row - first) for k, row in enumerate(rows) if first <= row < first + size]
        local = own_part(table)
        self.of_few = torch.tensor([k for k, _ in here], dtype=torch.int64, device=local.device)
        self.of_local = torch.tensor([row for _, row in here], dtype=torch.int64, device=local.device)
        self.others = torch.ones(local.shape[0], 1, dtype=torch.bool, device=local.device)
        self.others[self.of_local] = False

    def gather_KD(self, table: Tensor) -> Tensor:
        """The few rows, float32, on every rank."""
        local = own_part(table)
        few_KD = local.new_zeros(self.count, local.shape[1], dtype=torch.float32)
        few_KD[self.of_few] = local[self.of_local].float()
        for group in self.groups:
            dist.all_reduce(few_KD, group=group)
        return few_KD

    def add_(self, table: Tensor, few_KD: Tensor) -> None:
        """Add to those of the few rows that this rank holds."""
        local = own_part(table)
        local.index_add_(0, self.of_local, few_KD[self.of_few].to(local.dtype))


def _rows_held(table: Tensor) -> tuple[int, int, list[dist.ProcessGroup]]:
    """First row and number of rows on this rank, and the groups that the table is divided over."""
    if not isinstance(table, DTensor):
        return 0, table.shape[0], []
    mesh = table.device_mesh
    size, first = compute_local_shape_and_global_offset(table.shape, mesh, table.placements)
    divided = [dim for dim, p in enumerate(table.placements) if not p.is_replicate() and mesh.size(dim) > 1]
    return first[0], size[0], [mesh.get_group(dim) for dim in divided]


class RowAdamW(torch.optim.Optimizer):
    """A parameter group for each table has its `lr` and `rows`, the numbers of those that train."""

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float):
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.shares: dict[nn.Parameter, HeldRows] = {}
        for group in self.param_groups:
            rows = group.pop("rows")
            self.shares |= {table: HeldRows(table, rows) for table in group["params"]}

    @torch.no_grad()
    def drop_other_gradients(self) -> None:
        """Zero the gradients of the rows that do not train, before the norm is taken."""
        for table, share in self.shares.items():
            if table.grad is not None:
                own_part(table.grad).masked_fill_(share.others, 0)

    @torch.no_grad()
    def step(self, closure=None):  # the base class allows a closure; nothing here passes one
        """One update of every table that has a gradient, in place."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._move(table, group)

    def _move(self, table: nn.Parameter, group: Mapping) -> None:
        share, state, (beta1, beta2) = self.shares[table], self.state[table], group["betas"]
        assert table.grad is not None
        gradient_KD = share.gather_KD(table.grad)
        if not state:
            state["step"] = torch.zeros((), device=gradient_KD.device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(gradient_KD) for _ in range(2))
        state["step"] += 1
        mean_KD = state["exp_avg"].lerp_(gradient_KD, 1 - beta1)
        square_KD = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient_KD, gradient_KD, value=1 - beta2)
        deviation_KD = (square_KD / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        share.add_(table, -group["lr"] * mean_KD / (1 - beta1 ** state["step"]) / deviation_KD)
