"""What activation checkpointing computes, and sends, again in backward; counted."""

import tempfile
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference.small_run import CPU, SMALL, job_of
from torchtitan.build import build

ATTENTION = "torchtitan.segment_attention.default"
GATHER = "_c10d_functional.all_gather_into_tensor.default"
ALL_TO_ALL = "_c10d_functional.all_to_all_single.default"
DECODER, ENCODER = 4, 2  # layers


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(mode: str, method: str) -> Counter:
    """Calls of a forward and backward of one batch."""
    changes = {
        "parallelism.context_parallel_degree": 2,
        "parallelism.context_parallel_method": method,
        "activation_checkpoint.mode": mode,
        "activation_checkpoint.encoder_mode": mode,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = build(job_of(changes, folder), SMALL, CPU)
        batch = next(run.state.loader).batches[0]
        with Count() as counted:
            run.forward_backward(run.to_rank(batch), 1.0, True)
        return counted.calls


@pytest.mark.slow
@pytest.mark.parametrize("method", ["allgather", "ulysses"])
def test_selective_checkpointing_neither_attends_nor_sends_twice(pool, method):
    sent = {"allgather": GATHER, "ulysses": ALL_TO_ALL}[method]
    none, selective, full = (pool.run(2, count, mode, method)[0] for mode in ("none", "selective", "full"))
    assert none[ATTENTION] == selective[ATTENTION] == DECODER + ENCODER
    assert full[ATTENTION] == 2 * (DECODER + ENCODER)
    # Keys and values are gathered once a layer; the two exchanges of ulysses are undone by two in backward.
    assert none[sent] == selective[sent] == (DECODER if method == "allgather" else 4 * DECODER)
    assert full[sent] == none[sent] + (DECODER if method == "allgather" else 2 * DECODER)
    assert (
        selective["aten.mm.default"] + selective["aten.addmm.default"]
        == none["aten.mm.default"] + none["aten.addmm.default"]
    )


def test_the_counter_sees_operations():
    with Count() as counted:
        torch.ones(2) + 1
    assert counted.calls
