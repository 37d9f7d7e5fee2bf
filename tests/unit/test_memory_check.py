"""What a rank holds, against the tensors of a real step;
a job that does not fit is told before it is built.
"""

import pytest
import torch
from torch import nn

from tests.reference.small_run import CPU, SMALL, Tokenizer, job_of
from torchtitan.build import build
from torchtitan.components import memory_check
from torchtitan.components.freezing import choose_trained
from torchtitan.config.errors import ConfigError
from torchtitan.config.layout import Degrees
from torchtitan.distributed.process_group import close_process_group, open_process_group
from torchtitan.tools import hardware
from torchtitan.tools.hardware import GIB, host_memory_gib, memory_gib

ALONE = Degrees(1, 1, 1, 1, 1)


def bytes_after_a_step(job, folder) -> int:
    """Bytes of parameters, gradients and optimizer state."""
    run = build(job, SMALL, open_process_group(job.comm, folder))
    run.forward_backward(run.to_rank(next(run.state.loader).batches[0]), 1.0, True)
    run.state.optimizers.step()
    parameters = [parameter for part in run.forward_backward.parts for parameter in part.parameters()]
    held = [*parameters, *(parameter.grad for parameter in parameters if parameter.grad is not None)]
    states = [
        value
        for optimizer in run.state.optimizers
        for of in optimizer.state.values()
        for value in of.values()
    ]
    # no counters of steps
    held += [value for value in states if isinstance(value, torch.Tensor) and value.ndim]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


@pytest.fixture(autouse=True)
def _close_group():
    yield
    close_process_group()


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer.name": "Muon"}, {"training.freeze": ["encoder"]}],
    ids=["AdamW", "Muon", "frozen encoder"],
)
def test_a_rank_holds_what_is_counted(changes, tmp_path):
    job = job_of(changes, str(tmp_path))
    model = SMALL.build_model(job, Tokenizer())
    choose_trained(model, job.training)
    counted = memory_check.held_gib(model, job, ALONE)
    assert counted * GIB == pytest.approx(bytes_after_a_step(job, tmp_path))
    assert memory_check.held_gib(model, job, Degrees(2, 4, 1, 2, 1)) == pytest.approx(counted / 8), (
        "copies share nothing"
    )


def test_a_model_that_cannot_fit_is_told_before_it_gets_storage(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_check, "memory_gib", lambda device: 1e-4)
    monkeypatch.setattr(nn.Module, "to_empty", lambda *_, **__: pytest.fail("it was built"))
    job = job_of({}, str(tmp_path))
    with pytest.raises(
        ConfigError,
        match=r"model.flavor = small-qwen3 does not fit this machine: weights, gradients and AdamW",
    ):
        build(job, SMALL, open_process_group(job.comm, tmp_path))


@pytest.mark.parametrize(("held", "warned"), [(0.5, False), (0.9, True)])
def test_a_model_that_leaves_little_room_is_told(held, warned, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(memory_check, "memory_gib", lambda device: 1.0)
    with caplog.at_level("INFO", logger="torchtitan"):
        memory_check.require_room(held, job_of({}, str(tmp_path)), CPU)
    assert ("nearly fills this machine" in caplog.text) is warned


def test_ranks_of_a_machine_share_what_its_container_may_use(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    physical = host_memory_gib()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(hardware, "CONTAINER_LIMITS", (limit,))
    limit.write_text("max\n")
    assert memory_gib(CPU) >= physical
    limit.write_text(f"{2**20}\n")
    assert memory_gib(CPU) == 2**20 / GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_gib(CPU) == 2**18 / GIB
