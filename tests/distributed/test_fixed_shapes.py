"""Whatever the images, nothing is compiled again and nobody asks a device for a value, under layouts too."""

import functools
import tempfile
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

from tests.distributed.table import layout
from tests.reference.small_run import CPU, SMALL, job_of
from tests.unit.test_synchronisation import Trap
from torchtitan.build import build
from torchtitan.train import Trainer

STEPS = 50


class LayoutTrap(Trap):
    """Lets pass what a split embedding does: `x[mask] = 0.0`, one number of the host, which PyTorch makes a
    masked_fill.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.index_put_ and args[2].numel() == 1:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def recompiles(changes: dict[str, Any], steps: int) -> tuple[int, int]:
    """Graphs that the first step made, and how many more came in the others. Guards are the same whatever
    makes the kernels,
    so no time is spent on making them fast."""
    plain = torch.nn.Module.compile
    quick = functools.partialmethod(plain, backend="aot_eager")
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(torch.nn.Module, "compile", quick):
        trainer = Trainer(
            build(job_of(changes | {"compile.enable": True, "training.steps": steps}, folder), SMALL, CPU)
        )
        assert trainer.train_step()
        first = counters["stats"]["unique_graphs"]
        while trainer.state.step < steps:
            assert trainer.train_step()
        trainer.close()
        return first, counters["stats"]["unique_graphs"] - first


def trapped(changes: dict[str, Any]) -> int:
    """Operations of a forward and backward; raises where one would wait for a device."""
    with tempfile.TemporaryDirectory() as folder:
        run = build(job_of(changes, folder), SMALL, CPU)
        feed = run.to_rank(next(run.state.loader).batches[0])
        run.forward_backward(feed, 1.0, True)  # what is set up on first use may wait
        with LayoutTrap() as trap:
            run.forward_backward(feed, 1.0, True)
        return len(trap.seen)


@pytest.mark.parametrize(
    "case",
    [
        layout("one", 1, slots=4),
        pytest.param(layout("cp2", 2, cp=2, slots=4, sharing="on"), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.name,
)
def test_fifty_steps_of_mixed_images_compile_only_once(pool, case):
    for first, later in pool.run(case.ranks, recompiles, case.changes, STEPS):
        # One for each kind of block, forward; their backwards are part of it.
        assert first == 2 and later == 0


@pytest.mark.slow
def test_a_large_layout_compiles_only_in_its_first_step(pool):
    case = layout("fsdp2.tp2.cp2", 8, tp=2, cp=2)
    for first, later in pool.run(case.ranks, recompiles, case.changes, 5):
        assert first == 2 and later == 0


@pytest.mark.parametrize(
    "case",
    [
        layout("tp2", 2, tp=2, heads=True),
        pytest.param(layout("cp2", 2, cp=2), marks=pytest.mark.slow),
        pytest.param(layout("pp2", 2, pp=2), marks=pytest.mark.slow),
    ],
    ids=lambda c: c.name,
)
def test_forward_and_backward_never_wait_for_a_device(pool, case):
    assert min(pool.run(case.ranks, trapped, case.changes)) > 30
