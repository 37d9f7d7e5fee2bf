"""Two hundred steps in bfloat16, in every way that a GPU can run them, compared with float32 as a CPU would
compute it; the gradients of one step, parameter by parameter; and that images of all kinds in turn neither
compile anything anew nor wait.

pytest tests/gpu
"""

import dataclasses
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference.small_run import SMALL, DrawnLoader, DrawnStep, batch_of, job_of, whole
from torchtitan.build import build
from torchtitan.distributed.process_group import close_process_group, open_process_group
from torchtitan.train import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS, AGAIN = 200, 5  # the same five steps of data over and over, so that what is learned shows
BASE: dict[str, Any] = {
    "model.flavor": "small-wide",
    "training.local_batch_size": 4,
    "training.global_batch_size": -1,
    "training.steps": STEPS,
    "training.mixed_precision_param": "bfloat16",
    "optimizer.lr": 3e-4,
    "lr_scheduler.warmup_steps": 10,
}
REFERENCE = {"model.attention_backend": "sdpa", "training.mixed_precision_param": "float32"}
FULL = {"activation_checkpoint.mode": "full", "activation_checkpoint.encoder_mode": "full"}
SELECTIVE = {"activation_checkpoint.mode": "selective", "activation_checkpoint.encoder_mode": "selective"}
COMPILED = {"compile.enable": True}
GRAPHED = COMPILED | {"compile.cuda_graphs": True}
WAYS: dict[str, dict[str, Any]] = {
    "sdpa": {"model.attention_backend": "sdpa"},
    "flex": {},
    "flex, full recomputation": FULL,
    "compiled": COMPILED,
    "compiled, selective recomputation": COMPILED | SELECTIVE,
    "compiled, full recomputation": COMPILED | FULL,
    "graphed": GRAPHED,
    "graphed, full recomputation": GRAPHED | FULL,
}


class AgainLoader(DrawnLoader):
    """The first few steps in turn."""

    def __next__(self) -> DrawnStep:
        step = super().__next__()
        step.batches = [batch_of(self.mine, self.first + self.given % AGAIN, self.sizes)]
        return step


SPEC = dataclasses.replace(SMALL, build_loader=AgainLoader)


def trainer_of(changes: dict[str, Any], folder: Path) -> Trainer:
    job = job_of(BASE | changes, str(folder))
    gc.collect()  # a model of an earlier run goes only now
    torch._dynamo.reset()
    return Trainer(build(job, SPEC, open_process_group(job.comm, folder)))


def losses_of(changes: dict[str, Any], folder: Path, steps: int = STEPS) -> torch.Tensor:
    trainer = trainer_of(changes, folder)
    try:
        losses = []
        for _ in range(steps):
            trainer.train_step()
            losses.append(trainer.loss.clone())  # a graph's result holds until its next replay
        return torch.stack(losses).cpu()
    finally:
        trainer.close()
        close_process_group()


def gradients_of(changes: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    trainer = trainer_of(changes, folder)
    try:
        run = trainer.run
        (batch,) = next(run.state.loader).batches
        run.forward_backward(run.to_rank(batch), 1 / 100, True)
        (model,) = run.forward_backward.parts
        return {
            name.replace("_checkpoint_wrapped_module.", ""): whole(parameter.grad).float()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    finally:
        trainer.close()
        close_process_group()


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> torch.Tensor:
    return losses_of(REFERENCE, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def exact_gradients(tmp_path_factory) -> dict[str, torch.Tensor]:
    return gradients_of(REFERENCE, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("way", WAYS)
def test_two_hundred_steps_lose_what_float32_loses(way, reference, tmp_path):
    losses = losses_of(WAYS[way], tmp_path)
    assert reference[-AGAIN:].mean() < 0.8 * reference[:AGAIN].mean(), "something is learned"
    # One pass over the data each, since steps of other data differ by more than a rounding does.
    ours, theirs = losses.view(-1, AGAIN).mean(1), reference.view(-1, AGAIN).mean(1)
    assert (ours / theirs - 1).abs().max() < 0.03


@pytest.mark.parametrize("way", [name for name in WAYS if not name.startswith("graphed")])
def test_each_gradient_is_that_of_float32_within_the_rounding_of_bfloat16(way, exact_gradients, tmp_path):
    gradients = gradients_of(WAYS[way], tmp_path)
    assert gradients.keys() == exact_gradients.keys()
    largest = max(gradient.norm() for gradient in exact_gradients.values())
    for name, exact in exact_gradients.items():
        # The true gradient of a key's bias is 0: a small one is compared with the largest.
        assert (gradients[name] - exact).norm() < 0.05 * max(exact.norm(), 1e-2 * largest), name


@pytest.mark.parametrize("way", ["sdpa", "flex", "compiled", "graphed"])
def test_slots_of_text_and_of_images_in_turn_compile_nothing_and_never_wait(way, tmp_path):
    changes = WAYS[way] | {"training.local_batch_size": 1, "training.global_batch_size": 1}
    trainer = trainer_of(changes, tmp_path)
    loader, kinds = trainer.run.state.loader, [0, 3, 1, 2]  # every fourth slot is text alone
    try:
        for _ in range(6):  # graphs are recorded by then
            trainer.train_step()
        torch.cuda.synchronize()
        batches = [batch_of([kind], 1, loader.sizes) for kind in kinds]
        tensors = [trainer.run.to_rank(batch) for batch in batches]
        torch.cuda.synchronize()
        with warnings.catch_warnings(), torch._dynamo.config.patch(error_on_recompile=True):
            warnings.simplefilter("error")
            torch.cuda.set_sync_debug_mode("error")
            for one in tensors:
                trainer.take_step([one], 1 / 50)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.close()
        close_process_group()
