"""Bytes of all tensors that are alive, measured operation by operation: what an allocator of a GPU would have
to hold.

Slow and plain: after each operation the storages that somebody still refers to are added up, so that what
FSDP frees by resizing counts as freed. What an operator of our own allocates inside itself is not seen.
"""

import weakref

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0

    def add(self, *trees) -> None:
        """Tensors that were there before."""
        for leaf in pytree.tree_leaves(trees):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                local = leaf.to_local() if hasattr(leaf, "to_local") else leaf
                storage = local.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)

    def live(self) -> int:
        total = 0
        for key, reference in list(self.storages.items()):
            storage = reference()
            if storage is None:
                del self.storages[key]
            else:
                total += storage.nbytes()
        return total

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "_scale") for kind in types):
            return NotImplemented  # fp8 numbers with their scales: what is made of the two comes next
        out = func(*args, **(kwargs or {}))
        self.add(out)
        self.peak = max(self.peak, self.live())
        return out
