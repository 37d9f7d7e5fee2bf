"""What a step's kernels are, by kind: how often and how long, from one step under the profiler."""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first whose pattern is found in a kernel's name names its kind.
KINDS = {
    "attention": r"flex|flash|fmha|attention|varlen",
    "matrix products": r"gemm|nvjet|cutlass|wgmma|xmma|splitk|cublas",
    "optimizer": r"adam|multi_tensor_apply|FusedOptimizer|foreach",
    "copies of FSDP": r"chunk_cat|split_with_sizes|CatArray|nccl|all_gather|reduce_scatter",
    "fused elementwise": r"triton",
    "copies": r"Memcpy|Memset|copy",
    "other": r"",
}


class Row(NamedTuple):
    kind: str
    launches: int
    seconds: float


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))


def profiled(step: Callable[[], object], longest: int = 25) -> tuple[list[Row], list[str]]:
    """Rows by time, and lines of the kernels that take longest."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    launches: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    each: dict[str, list[float]] = defaultdict(list)
    for event in seen.events():
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        kind = kind_of(event.name)
        launches[kind] += 1
        seconds[kind] += event.device_time / 1e6
        each[event.name].append(event.device_time / 1e6)
    rows = sorted(
        (Row(kind, launches[kind], seconds[kind]) for kind in launches), key=lambda row: -row.seconds
    )
    names = sorted(each, key=lambda name: -sum(each[name]))[:longest]
    return rows, [f"{1000 * sum(each[name]):9.2f} ms {len(each[name]):5}  {name[:130]}" for name in names]
