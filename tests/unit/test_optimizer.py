"""Muon against PyTorch's and against a singular value decomposition;
which parameter goes to which optimizer.
"""

import pytest
import torch
from torch import nn

from torchtitan.components.lr_scheduler import Schedule
from torchtitan.components.muon import COEFFICIENTS, STEPS, Muon, orthogonalise
from torchtitan.components.optimizer import Optimizers, moments, trainable
from torchtitan.components.parameter_groups import settings
from torchtitan.config.job import LRScheduler, Optimizer


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(24, 16), (16, 24), (16, 24), (8, 8)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def run(optimizer_of, steps: int = 4) -> list[torch.Tensor]:
    parameters = matrices()
    optimizer = optimizer_of(parameters)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_muon_equals_pytorchs_in_bfloat16():
    # Batched and single products may round differently in bfloat16: a few of its 3 significant digits, at a
    # learning rate of 0.02.
    ours = run(lambda p: Muon(p, lr=0.02, momentum=0.95, weight_decay=0.1, dtype=torch.bfloat16))
    theirs = run(lambda p: torch.optim.Muon(p, lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-3)


def test_muon_in_float32_follows_the_polynomial_of_the_singular_values():
    update = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0))
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
    s = s / update.double().norm(dim=(-2, -1))[:, None]
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(
        orthogonalise(update, torch.float32).double(), u @ torch.diag_embed(s) @ v, atol=1e-5
    )


def test_orthogonalised_singular_values_are_near_one():
    update = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(update, torch.float32))
    assert values.min() > 0.6 and values.max() < 1.3


class Model(nn.Module):
    TOKEN_TABLES = ("embeddings.weight",)

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(10, 8)
        self.hidden = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.output = nn.Linear(8, 10, bias=False)


def optimizers_of(
    model: Model, options: Optimizer, adamw_only: tuple[str, ...] = (), rows: tuple[int, ...] = ()
) -> Optimizers:
    return Optimizers([model], options, settings(model, options, rows), adamw_only)


def step(model: Model, optimizers: Optimizers) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizers.step()


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = Model()
    optimizers = optimizers_of(model, Optimizer(name="Muon"), ("embeddings", "output"))
    step(model, optimizers)
    muon, adamw = optimizers
    assert [parameter is model.hidden.weight for parameter in muon.state] == [True]
    taken = {id(parameter) for parameter in adamw.state}
    assert taken == {id(p) for p in (model.embeddings.weight, model.output.weight, model.hidden.bias)}


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_moments_are_the_numbers_of_the_state(name):
    model, options = Model(), Optimizer(name=name)
    optimizers = optimizers_of(model, options, ("embeddings", "output"))
    step(model, optimizers)
    kept = [
        value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()
    ]
    assert moments(trainable(model), options, ("embeddings", "output")) == sum(
        value.numel() for value in kept if value.ndim
    )


def test_a_frozen_part_keeps_no_state_and_does_not_move():
    model = Model()
    before = [parameter.clone() for parameter in model.frozen.parameters()]
    optimizers = optimizers_of(model, Optimizer())
    step(model, optimizers)
    states = [parameter for optimizer in optimizers for parameter in optimizer.state]
    assert not any(parameter is frozen for parameter in states for frozen in model.frozen.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.frozen.parameters(), strict=True))


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_rows_that_train_move_as_if_alone_and_the_others_not_by_a_bit(name):
    torch.manual_seed(0)
    model, rows = Model(), (2, 7)
    table = model.embeddings.weight
    before, alone = table.detach().clone(), nn.Parameter(table.detach()[list(rows)])
    options = Optimizer(name, lr=0.1, weight_decay=0.5)
    optimizers = optimizers_of(model, options, ("embeddings",), rows)
    reference = torch.optim.AdamW([alone], 0.1, (options.beta1, options.beta2), options.eps, weight_decay=0.0)
    for _ in range(3):
        table.grad = torch.randn_like(table)
        alone.grad = table.grad[list(rows)].clone()
        optimizers.drop_frozen_rows()
        others = [row for row in range(10) if row not in rows]
        assert not table.grad[others].any() and torch.equal(table.grad[list(rows)], alone.grad)
        optimizers.step()
        reference.step()
    assert torch.equal(table[others], before[others])
    assert torch.allclose(table[list(rows)], alone, atol=1e-6)
    (state,) = [optimizer.state[table] for optimizer in optimizers if table in optimizer.state]
    assert all(value.numel() <= 2 * 8 for value in state.values()), "moments of two rows alone"


def test_weight_decay_shrinks_matrices_and_leaves_vectors():
    model = Model()
    optimizers = optimizers_of(model, Optimizer(lr=0.1, weight_decay=0.5))
    bias, weight = model.hidden.bias.clone(), model.hidden.weight.clone()
    for parameter in optimizers.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    assert torch.equal(model.hidden.bias, bias)
    assert torch.allclose(model.hidden.weight, weight * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("implementation", ["auto", "fused", "foreach", "for-loop"])
def test_every_implementation_makes_the_same_step(implementation):
    torch.manual_seed(0)
    model = Model()
    reference = [parameter.clone() for parameter in model.parameters() if parameter.requires_grad]
    optimizers = optimizers_of(
        model, Optimizer(lr=0.01, eps=1e-6, weight_decay=0.1, implementation=implementation)
    )
    step(model, optimizers)
    # The first step of AdamW with a gradient of ones: decay, then the learning rate against the sign.
    for before, after in zip(reference, (p for p in model.parameters() if p.requires_grad), strict=True):
        decayed = before * (1 - 0.01 * 0.1) if before.ndim == 2 else before
        assert torch.allclose(after, decayed - 0.01 / (1 + 1e-6), atol=1e-6)


def test_a_jobs_options_win_over_those_of_a_checkpoint():
    model = Model()
    optimizers = optimizers_of(model, Optimizer(lr=0.5, weight_decay=0.3))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(lr=9.0, weight_decay=9.0)
    Schedule(optimizers, 10, LRScheduler(warmup_steps=0, decay_ratio=0.1)).advance()
    (adamw,) = optimizers
    assert [group["lr"] for group in adamw.param_groups] == [0.5, 0.5]
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0, 0.3}
