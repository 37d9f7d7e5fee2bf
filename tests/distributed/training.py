"""What ranks of the pool do in test_training.py: train the fake job some steps, and give back what can be compared."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.reference.fake_run import FAKE, fake_job
from torchtitan.build import build
from torchtitan.components.optimizer import trainable
from torchtitan.distributed import grad_norm
from torchtitan.train import Trainer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Watched(Trainer):
    """Keeps the loss, the gradient norm and the weights of each step, and the gradients of the first."""

    def train(self) -> dict[str, Any]:
        self.seen: dict[str, Any] = {"loss": [], "norm": [], "gradients": {}}
        super().train()
        self.seen["weights"] = {name: whole(tensor) for name, tensor in self.state.model().items()}
        return self.seen

    def update(self) -> torch.Tensor:
        if not self.seen["gradients"]:
            parameters = [pair for part in self.run.passes.parts for pair in trainable(part)]
            self.seen["gradients"] = {name: whole(p.grad) for name, p in parameters if p.grad is not None}
        norm = super().update()
        self.seen["norm"].append(norm.item())
        return norm

    def log(self) -> None:
        loss = self.loss.clone()
        dist.all_reduce(loss)
        self.seen["loss"].append(loss.item())
        super().log()


def train(folder: str, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    job = fake_job(folder, **sections)
    trainer = Watched(build(job, FAKE, torch.device("cpu")))
    try:
        return trainer.train()
    finally:
        trainer.close()


def norm_of_mixed_gradients(folder: str) -> tuple[float, float]:
    """Ours, and the norm of the gradients gathered whole."""
    run = build(fake_job(folder), FAKE, torch.device("cpu"))
    torch.manual_seed(0)
    total = 0.0
    for parameter in run.optimizers.parameters:
        full = torch.randn(parameter.shape)
        total += float(full.double().square().sum())
        assert isinstance(parameter, DTensor)
        parameter.grad = DTensor.from_local(full, parameter.device_mesh).redistribute(placements=parameter.placements)
    return float(grad_norm.global_norm(run.optimizers.parameters, run.mesh)), total**0.5


def saved_steps(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("checkpoint/*"))
