"""A function on two ranks over gloo, for tests that need no more than that; each rank is a process of its
own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _work(rank: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(function(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def on_two_ranks(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `function(rank)` returned on each rank: tensors, in lists and dictionaries.

    It must be importable.
    """
    torch.multiprocessing.spawn(_work, (function, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
