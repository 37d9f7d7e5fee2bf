"""What ranks of the pool do in test_training.py: train the fake job some steps, and give back what can be compared."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.reference.fake_run import FAKE, fake_job
from torchtitan.build import build
from torchtitan.components import checkpoint, muon
from torchtitan.components.optimizer import trainable
from torchtitan.config.errors import ConfigError
from torchtitan.distributed import grad_norm, process_group
from torchtitan.train import Trainer, require_one_job


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


def muon_apart_and_together() -> float:
    """Largest difference between sharing the work and doing all of it, over shapes whose rows do not divide evenly."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    worst = 0.0
    for rows, columns, matrices in ((8, 6, 3), (7, 12, 2), (5, 5, 1), (1, 9, 2)):
        generator = torch.Generator().manual_seed(rows)
        whole = torch.randn(matrices, rows, columns, generator=generator)
        updates = [distribute_tensor(matrix, mesh, [Shard(0)], src_data_rank=None) for matrix in whole]
        group = muon._row_group(updates[0])
        assert group is not None
        apart = muon.directions_apart(updates, group, torch.float32)
        together = muon.directions_together(updates, torch.float32)
        for a, b in zip(apart, together, strict=True):
            assert a.shape == b.shape
            worst = max(worst, float((a - b).abs().max()) if a.numel() else 0.0)
    return worst


def wait_for_a_stuck_rank(folder: str) -> str:
    """Rank 1 stays in step 2; what rank 0 then knows."""
    trainer = Trainer(build(fake_job(folder, comm={"train_timeout_seconds": 2}), FAKE, torch.device("cpu")))
    try:
        trainer.train_step()
        trainer.state.step = 1
        process_group.set_timeout(2)
        process_group.note_step(2)
        if dist.get_rank() == 1:
            time.sleep(5)
            return ""
        process_group.note_step(3)
        trainer.sum_counts(None)
    except RuntimeError as error:
        assert "time" in str(error).lower()
        return process_group.laggards()
    finally:
        trainer.close()
    raise AssertionError("the collective was not given up")


def who_is_blamed() -> str:
    """Two of four ranks lose the others (one inside a pipeline's stage), one fails by itself, the last says nothing."""
    rank, wrapped = dist.get_rank(), RuntimeError("[Stage 1] failed to run forward")
    wrapped.__cause__ = RuntimeError("Timed out waiting 8000ms for recv operation to complete")
    errors = [wrapped, RuntimeError("Connection closed by peer [127.0.0.1]:1"), ValueError("a bad shard")]
    process_group.note_step(5)
    dist.barrier()
    return process_group.who_is_to_blame(errors[rank]) if rank < len(errors) else ""


def save_then_spoil(folder: str, async_mode: str) -> bool:
    """Save, and change every weight and moment at once, as training would; is what was saved that of before?"""
    sections = {"checkpoint": {"enable": True, "async_mode": async_mode, "interval": 100}}
    trainer = Trainer(build(fake_job(folder, **sections), FAKE, torch.device("cpu")))
    trainer.train_step()
    before = {name: whole(tensor) for name, tensor in trainer.state.tensors(False).items()}
    trainer.run.checkpointer.save()
    for tensor in (trainer.state.model() | trainer.state.optimizer()).values():
        tensor.zero_()
    trainer.run.checkpointer.wait()
    dist.barrier()
    trainer.run.checkpointer.load()
    trainer.close()
    after = trainer.state.tensors(False)
    return before.keys() == after.keys() and all(torch.equal(tensor, whole(after[name])) for name, tensor in before.items())


def fail_while_writing(folder: str) -> list[str]:
    """Steps that count as complete after a write that broke off in the middle."""
    trainer = Trainer(build(fake_job(folder, checkpoint={"enable": True}), FAKE, torch.device("cpu")))
    trainer.train_step()
    plain, checkpoint.dcp.save = checkpoint.dcp.save, _write_half
    try:
        trainer.run.checkpointer.save()
    except OSError:
        pass
    finally:
        checkpoint.dcp.save = plain
        trainer.close()
    written = Path(folder) / "checkpoint"
    assert any(written.iterdir()), "something was written"
    return checkpoint.complete_steps(written)


def _write_half(tensors, storage_writer) -> None:
    (Path(storage_writer.path) / "__0_0.distcp").write_bytes(b"half")
    raise OSError("no space left on device")


def start_with_another_learning_rate(folder: str) -> str:
    """Rank 1 is told another one, and another warm-up; what each rank says."""
    mine = {"optimizer": {"lr": 0.1}, "lr_scheduler": {"warmup_steps": 7}} if dist.get_rank() == 1 else {}
    with pytest.raises(ConfigError) as caught:
        require_one_job(fake_job(folder, **mine))
    return str(caught.value)


def validate_then_save(folder: str) -> bool:
    """Whether a checkpoint holds the same right after a validation as before it, tensor for tensor."""
    trainer = Trainer(build(fake_job(folder), FAKE, torch.device("cpu")))
    trainer.train_step()
    before = {name: whole(tensor) for name, tensor in trainer.state.tensors(False).items()}
    trainer.run.validator.evaluate()
    after = {name: whole(tensor) for name, tensor in trainer.state.tensors(False).items()}
    trainer.close()
    return before.keys() == after.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
