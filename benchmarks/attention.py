"""How much faster than a dense mask is attention that knows its segments?

    python benchmarks/attention.py [--threads 1] [--seconds 1.0]

Forward and backward of one layer's attention over packed rows, against one call with the dense boolean mask
in the same run: by segments on CPU, by flex on GPU (which has no segment kernel, as flex has no backward on
CPU). Expected: a dense mask computes rows * rows pairs, where each segment's length squared is all that is
needed (half of it where causal), so "at most" is the ratio of the pairs. Long segments should come near half
of it, one document of the whole row gain nothing but its causal half. On GPU flex skips whole blocks of 128
alone, so that shorter segments win less.

A prediction that was wrong: images of 16 patches were to be slower by segments, since gathering them costs as
much as attending. They are 4 times faster: equal lengths share one call, and its cost is paid once.
"""

import argparse
import json
import platform
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
    for case in CASES:
        dense = measure(case, "sdpa", True, device, options.seconds)
        ours = measure(case, "flex" if device == "cuda" else "sdpa", False, device, options.seconds)
        most = sum(case.lengths) ** 2 / sum(length**2 for length in case.lengths) * (2 if case.causal else 1)
        print(f"{case.name:32}{dense:10.2f}{ours:13.2f}{dense / ours:8.1f}{most:9.1f}")
        rows.append(
            {
                "case": case.name,
                "dense_ms": round(dense, 3),
                f"{other}_ms": round(ours, 3),
                "ratio": round(dense / ours, 2),
            }
        )
    print(
        json.dumps({"benchmark": "attention", "hardware": hardware, "torch": torch.__version__, "rows": rows})
    )


if __name__ == "__main__":
    main()
