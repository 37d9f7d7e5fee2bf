"""A CUDA graph without a GPU: the operations of one run are written down and then repeated on the same
tensors, without Python.

Whatever the host decided during that run (a number, a branch) stays as it was, as in a CUDA graph.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed import Work
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from experiments.vlm.config import VLMJobConfig
from tests.reference.small_run import SMALL, job_of, whole
from torchtitan.build import build
from torchtitan.components.cuda_graph import GraphedStep
from torchtitan.config.job import ParameterGroup
from torchtitan.distributed.process_group import close_process_group, open_process_group
from torchtitan.train import Trainer

plain_wait = Work.wait


def wait(work: Work, *arguments: Any) -> bool:
    """Some of gloo's collectives copy their result, from a buffer of their own, when they are waited for: no
    part of the tape.
    """
    with _disable_current_modes():
        return plain_wait(work, *arguments)


class Writer(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, list]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # they are asked first, and what they do with plain tensors comes here
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host asks for a value"
        result = func(*args, **(kwargs or {}))
        if func.namespace != "profiler":
            # Lists are copied, since FSDP empties some of its own later.
            self.operations.append((func, *tree_map(lambda x: x, (args, kwargs or {})), tree_leaves(result)))
        return result

    def repeat(self) -> None:
        for func, args, kwargs, results in self.operations:
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(new, torch.ScriptObject):
                    new.wait()
                elif type(old) is torch.Tensor:  # what wraps a tensor has no memory of its own
                    if func.namespace == "_c10d_functional":
                        new = torch.ops._c10d_functional.wait_tensor(new)
                    # no view, and not changed in place
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


class TapeRecorder:
    """Stands in for `Recorder`.

    FSDP keeps the memory of gathered weights meanwhile, as a graph's own memory would be kept.
    """

    def __init__(self, patch: Any) -> None:
        patch.setattr(_fsdp_param, "free_storage", lambda tensor: None)
        patch.setattr(Work, "wait", wait)
        self.replays = 0

    def run(self, work: Callable) -> Any:
        return work()

    def record(self, work: Callable) -> Callable:
        """Other than a GPU's, this recording has already made the step that it records: the first replay is
        that.
        """
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
JOB = {
    "training.local_batch_size": 2,
    "training.global_batch_size": -1,
    "training.steps": STEPS,
    "optimizer.lr": 8e-4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Muon, two microbatches": {"optimizer.name": "Muon", "training.global_batch_size": 4},
    "checkpointing": {
        "activation_checkpoint.mode": "full",
        "activation_checkpoint.encoder_mode": "selective",
    },
    "groups, some rows of frozen tables": {
        "optimizer.groups": [ParameterGroup("encoder", lr=2e-4), ParameterGroup("decoder", layer_decay=0.9)],
        "training.freeze": ["tok_embeddings", "output"],
        "training.trainable_tokens": ["new"],
    },
    "adapters": {"lora.rank": 4, "lora.patterns": ["decoder", "encoder"]},
}


# After which steps the held-out split is scored; the fourth is recorded.
VALIDATIONS = {
    "before": (1,),
    "right before": (3,),
    "between replays": (5, 7),
    "always": tuple(range(1, STEPS + 1)),
}


class Seen(NamedTuple):
    losses: list[float]
    by_source: list[float]  # summed over the steps
    norms: list[float]
    held_out: list[float]  # losses
    weights: dict[str, torch.Tensor]


def train_with(
    recorder: Any, folder: Path, changes: dict[str, Any], validate_after: Collection[int] = ()
) -> Seen:
    """JOB for a few steps in this process, each driven by Python (None) or replayed from the fourth on."""
    job = short_job(recorder, folder, changes)
    device = open_process_group(job.comm, folder)
    try:
        return train(recorder, job, device, validate_after)
    finally:
        close_process_group()


def short_job(recorder: Any, folder: Path, changes: dict[str, Any]) -> VLMJobConfig:
    return job_of(JOB | {"compile.cuda_graphs": recorder is not None} | changes, str(folder))


def train(
    recorder: Any, job: VLMJobConfig, device: torch.device, validate_after: Collection[int] = ()
) -> Seen:
    run = build(job, SMALL, device)
    job.compile.cuda_graphs = False  # the recorder is ours to choose
    trainer = Trainer(run)
    if recorder is not None:
        trainer.take_step = GraphedStep(trainer.optimizer_step, recorder)
    seen = Seen([], [], [], [], {})
    while trainer.state.step < STEPS and trainer.train_step():
        seen.losses.append(trainer.loss.item())
        seen.norms.append(trainer.grad_norm.item())
        if trainer.state.step in validate_after:
            seen.held_out.append(run.validator.evaluate()["loss"] or 0.0)
    seen.by_source.extend(trainer.source_losses.sums_G.tolist())
    for name, tensor in trainer.state.model().items():
        seen.weights[name] = whole(tensor)
    trainer.close()
    return seen


def replay_on_rank(folder: str, changes: dict[str, Any]) -> None:
    """For a rank of the pool: its steps, driven and replayed, are the same, and validation sees the same
    weights after each.
    """
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for name, recorder in (("driven", None), ("replayed", TapeRecorder(patch))):
            job = short_job(recorder, Path(folder) / name, changes)
            seen.append(train(recorder, job, torch.device("cpu"), VALIDATIONS["always"]))
    assert_same(seen[1], seen[0], 1e-5)  # gloo adds in another order now and then
    assert recorder is not None and recorder.replays == 6


def assert_same(replayed: Seen, driven: Seen, tolerance: float) -> None:
    assert len(set(driven.losses)) == STEPS  # other batches and other weights in every step
    assert replayed.losses == pytest.approx(driven.losses, rel=tolerance)
    assert replayed.by_source == pytest.approx(driven.by_source, rel=tolerance) and min(driven.by_source) > 0
    assert replayed.norms == pytest.approx(driven.norms, rel=10 * tolerance)
    assert replayed.held_out == pytest.approx(driven.held_out, rel=tolerance)
    for name, tensor in driven.weights.items():
        assert torch.allclose(replayed.weights[name], tensor, rtol=10 * tolerance, atol=tolerance), name
