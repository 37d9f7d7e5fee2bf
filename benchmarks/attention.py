"""How much faster than a dense mask is attention that knows its segments?

    python benchmarks/attention.py [--threads 1] [--seconds 1.0]

Forward and backward of one layer's attention over packed rows, against one call with the dense boolean mask
in the same run: by segments on CPU, by flex on GPU (which has no segment kernel, as flex has no backward on
CPU). Expected: a dense mask computes rows * rows pairs, where each segment's length squared is all that is
needed (half of it where causal), so "at most" is the ratio of the pairs. Long segments should come near half
of it, one document of the whole row gain nothing but its causal half. On GPU flex skips whole blocks of 128
alone, so that shorter segments win less; there rows as long as those that are trained are added, and
torch's kernels for segments of variable length are measured too (results/2026-11-28-gpu.md).

A prediction that was wrong: images of 16 patches were to be slower by segments, since gathering them costs as
much as attending. They are 4 times faster: equal lengths share one call, and its cost is paid once.
"""

import argparse
import inspect
import itertools
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from torchtitan.layers.attention import InnerAttention, prepare_mask
from torchtitan.layers.masks import Mask


class Case(NamedTuple):
    name: str
    lengths: list[int]
    causal: bool
    heads: int
    kv_heads: int
    width: int


CASES = [
    Case("16 images of 64 patches", [64] * 16, False, 6, 6, 64),
    Case("64 images of 16 patches", [16] * 64, False, 6, 6, 64),
    Case("16 images of 256 patches", [256] * 16, False, 6, 6, 64),
    Case("images of 20 to 300 patches", [20, 300, 77, 150, 40, 220, 96, 121], False, 6, 6, 64),
    Case("4 documents of 1024 tokens", [1024] * 4, True, 8, 2, 64),
    Case("1 document of 1024 tokens", [1024], True, 8, 2, 64),
]


def drawn(total: int, shortest: int, longest: int) -> list[int]:
    """Lengths that fill a row."""
    draw, lengths = random.Random(0), []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(draw.randint(shortest, longest), left))
    return lengths


GPU_CASES = [
    Case("so400m: images of 14336 patches", drawn(14336, 64, 1024), False, 16, 16, 72),
    Case("3B: documents of 8192 tokens", drawn(8192, 100, 800), True, 24, 8, 128),
    Case("3B: 1 document of 8192 tokens", [8192], True, 24, 8, 128),
]


def everything(b: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (b + q + k) >= 0


def segments_of(lengths: list[int], device: str) -> torch.Tensor:
    names = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    return names[None].to(device)


def median_ms(step: Callable[[], None], seconds: float, synchronise: Callable[[], None]) -> float:
    """Median of single steps over at least `seconds`, after two to warm up."""
    for _ in range(2):
        step()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        synchronise()
        start = time.perf_counter()
        step()
        synchronise()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def measure(case: Case, backend: str, dense: bool, device: str, seconds: float) -> float:
    """Milliseconds of one forward and backward; the mask is prepared outside, as a step does once for all
    layers.
    """
    segments = segments_of(case.lengths, device)
    # A predicate that forbids nothing sends the sdpa backend to its dense mask.
    prepared = prepare_mask(Mask(segments, case.causal, predicate=everything if dense else None), backend)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    total = segments.shape[1]
    q, k, v = (
        torch.randn(1, total, h, case.width, device=device, dtype=dtype, requires_grad=True)
        for h in (case.heads, case.kv_heads, case.kv_heads)
    )
    inner = InnerAttention(backend)
    grad = torch.randn(1, total, case.heads, case.width, device=device, dtype=dtype)

    def step() -> None:
        torch.autograd.grad(inner(q, k, v, prepared), (q, k, v), grad)

    return median_ms(step, seconds, torch.cuda.synchronize if device == "cuda" else lambda: None)


def measure_varlen(case: Case, seconds: float) -> float:
    """As `measure`, by torch's kernels for segments that lie one after the other; on GPU alone."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32, device="cuda")
    longest, total = max(case.lengths), sum(case.lengths)
    q, k, v = (
        torch.randn(total, h, case.width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (case.heads, case.kv_heads, case.kv_heads)
    )
    grad, window = torch.randn_like(q), (-1, 0) if case.causal else (-1, -1)
    # from torch 2.13 on it has to be said that heads share keys
    shared = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def step() -> None:
        out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=window, **shared)
        torch.autograd.grad(out, (q, k, v), grad)

    return median_ms(step, seconds, torch.cuda.synchronize)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch on CPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="measured time a case and backend")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    other = "flex" if device == "cuda" else "segments"
    hardware = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor() or platform.machine()}, {options.threads} threads"
    )
    print(f"attention, forward + backward, {hardware}, torch {torch.__version__}")
    print(f"{'case':32}{'dense ms':>10}{other + ' ms':>13}{'ratio':>8}{'at most':>9}")
    rows = []
    for case in CASES + GPU_CASES * (device == "cuda"):
        dense = measure(case, "sdpa", True, device, options.seconds)
        ours = measure(case, "flex" if device == "cuda" else "sdpa", False, device, options.seconds)
        most = sum(case.lengths) ** 2 / sum(length**2 for length in case.lengths) * (2 if case.causal else 1)
        print(f"{case.name:32}{dense:10.2f}{ours:13.2f}{dense / ours:8.1f}{most:9.1f}")
        row = {"case": case.name, "dense_ms": dense, f"{other}_ms": ours, "ratio": dense / ours}
        if device == "cuda":
            row["varlen_ms"] = measure_varlen(case, options.seconds)
            print(f"{'variable length':45}{row['varlen_ms']:13.2f}")
        rows.append({name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()})
    print(
        json.dumps({"benchmark": "attention", "hardware": hardware, "torch": torch.__version__, "rows": rows})
    )


if __name__ == "__main__":
    main()
