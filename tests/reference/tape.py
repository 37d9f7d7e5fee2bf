"""A CUDA graph without a GPU: the operations of one run are written down and then repeated on the same tensors, without Python.

Whatever the host decided during that run (a number, a branch) stays as it was, as in a CUDA graph.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.reference.fake_run import FAKE, fake_job
from torchtitan.build import build
from torchtitan.components.cuda_graph import GraphedStep
from torchtitan.distributed.process_group import close_process_group, open_process_group
from torchtitan.train import Trainer


def storage(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage().data_ptr()


class Writer(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, list]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host asks for a value"
        result = func(*args, **(kwargs or {}))
        if func.namespace != "profiler":
            self.operations.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    def repeat(self) -> None:
        for func, args, kwargs, results in self.operations:
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(new, torch.ScriptObject):
                    new.wait()  # a collective's
                elif isinstance(new, torch.Tensor) and storage(new) != storage(old):  # no view, and not changed in place
                    old.copy_(new)


class TapeRecorder:
    """Stands in for `Recorder`. FSDP keeps the memory of gathered weights meanwhile, as a graph's own memory would be kept."""

    def __init__(self, patch: Any) -> None:
        patch.setattr(_fsdp_param, "free_storage", lambda tensor: None)
        self.replays = 0

    def run(self, work: Callable) -> Any:
        return work()

    def record(self, work: Callable) -> Callable:
        """Other than a GPU's, this recording has already made the step that it records: the first replay is that."""
        writer = Writer()
        with writer:
            result = work()

        @torch.no_grad()
        def replay() -> Any:
            if self.replays:
                writer.repeat()
            self.replays += 1
            return result

        return replay


STEPS = 9
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "AdamW": {},
    "Muon, two microbatches": {"optimizer": {"name": "Muon"}, "training": {"global_batch_size": 4}},
    "checkpointing": {"activation_checkpoint": {"mode": "full", "encoder_mode": "selective"}},
}


class Seen(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


def train_with(recorder: Any, folder: Path, sections: dict) -> Seen:
    """The fake job for a few steps, each driven by Python (None) or replayed from the fourth on."""
    sections = copy.deepcopy(sections)
    sections.setdefault("training", {})["steps"] = STEPS
    sections.setdefault("compile", {})["cuda_graphs"] = recorder is not None
    job = fake_job(str(folder), **sections)
    device = open_process_group(job.comm, folder)
    try:
        run = build(job, FAKE, device)
        job.compile.cuda_graphs = False  # the recorder is ours to choose
        trainer = Trainer(run)
        if recorder is not None:
            trainer.take_step = GraphedStep(trainer.optimizer_step, recorder)
        seen = Seen([], [], {})
        while trainer.state.step < STEPS and trainer.train_step():
            seen.losses.append(trainer.loss.item())
            seen.norms.append(trainer.grad_norm.item())
        for name, tensor in trainer.state.model().items():
            seen.weights[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        trainer.close()
    finally:
        close_process_group()
    return seen


def assert_same(replayed: Seen, driven: Seen, tolerance: float) -> None:
    assert len(set(driven.losses)) == STEPS  # other batches and other weights in every step
    assert replayed.losses == pytest.approx(driven.losses, rel=tolerance)
    assert replayed.norms == pytest.approx(driven.norms, rel=10 * tolerance)
    for name, tensor in driven.weights.items():
        assert torch.allclose(replayed.weights[name], tensor, rtol=10 * tolerance, atol=tolerance), name
