"""Bytes that this rank sends in collectives, counted one by one as they are dispatched."""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def _group(args: tuple) -> dist.ProcessGroup:
    group = next(
        arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
    )
    return torch._C._distributed_c10d.ProcessGroup.unbox(group)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class SentBytes(TorchDispatchMode):
    """Gathers, scatters and messages; the few numbers of all-reduces are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        match func.overloadpacket.__name__:
            case "_allgather_base_":
                self.total += _bytes(args[1]) * (_group(args).size() - 1)
            case "_reduce_scatter_base_":
                self.total += _bytes(args[1]) * (1 - 1 / _group(args).size())
            case "all_gather_into_tensor":
                self.total += _bytes(args[0]) * (args[1] - 1)
            case "reduce_scatter_tensor":
                self.total += _bytes(args[0]) * (1 - 1 / args[2])
            case "alltoall_base_":
                to_others = [size for rank, size in enumerate(args[4]) if rank != _group(args).rank()]
                self.total += sum(to_others) * args[1].element_size()
            case "all_to_all_single":
                self.total += _bytes(args[0]) * (1 - 1 / len(args[2]))  # parts of equal size
            case "send":
                self.total += sum(map(_bytes, args[0]))
        return func(*args, **(kwargs or {}))
