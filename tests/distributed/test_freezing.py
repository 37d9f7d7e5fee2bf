"""What is frozen by pattern stays as it is, bit for bit, and costs no gradient and no optimizer state."""

import tempfile

import pytest
import torch

from experiments.vlm.model.vlm import VLM
from tests.distributed.table import FREEZE, LAYOUTS
from tests.reference.small_run import CPU, SMALL, Tokenizer, job_of, whole
from torchtitan.build import build
from torchtitan.components.freezing import freeze, rows_of
from torchtitan.train import Trainer


class Watched(Trainer):
    def update(self) -> torch.Tensor:
        self.with_gradient = {
            name
            for part in self.run.forward_backward.parts
            for name, parameter in part.named_parameters()
            if parameter.grad is not None
        }
        return super().update()


def moved_and_kept(changes: dict) -> tuple[set[str], set[str], set[str], set[str]]:
    """Names of this rank's weights, and of those that moved in two steps, had gradients, have state."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Watched(build(job_of(changes, folder), SMALL, CPU))
        before = {name: whole(weight) for name, weight in trainer.state.model().items()}
        assert trainer.train_step() and trainer.train_step()
        after = {name: whole(weight) for name, weight in trainer.state.model().items()}
        state = trainer.state.optimizer()
        trainer.close()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    bare = {name.removeprefix("optimizer.").rpartition(".")[0] for name in state}
    return {name.removeprefix("model.") for name in after}, strip(moved), trainer.with_gradient, bare


def strip(names: set[str]) -> set[str]:
    return {name.removeprefix("model.") for name in names}


@pytest.mark.parametrize("optimizer", ["AdamW", pytest.param("Muon", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", ["fsdp2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("tp2", "pp2"))]
)
def test_frozen_tensors_do_not_move_and_have_neither_gradient_nor_state(pool, kind, optimizer):
    changes = LAYOUTS[f"{kind}, frozen by pattern"].changes | {"optimizer.name": optimizer}
    model = SMALL.build_model(job_of(changes, "unused"), Tokenizer())
    freeze(model, FREEZE)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for held, moved, with_gradient, with_state in pool.run(2, moved_and_kept, changes):
        assert moved == with_gradient == with_state == trained & held


def rows_moved(changes: dict) -> dict[str, tuple[list[int], list[int]]]:
    """Each table of this rank: which rows moved in two steps, and the shapes of its moments."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(build(job_of(changes, folder), SMALL, CPU))
        tables = [f"model.{name}" for name in VLM.TOKEN_TABLES]
        weights = trainer.state.model()
        before = {name: whole(weights[name]) for name in tables if name in weights}
        assert trainer.train_step() and trainer.train_step()
        state, weights = trainer.state.optimizer(), trainer.state.model()
        trainer.close()
    found = {}
    for name, table in before.items():
        differs = (whole(weights[name]) != table).any(-1).nonzero().flatten().tolist()
        moments = state[f"optimizer.{name.removeprefix('model.')}.exp_avg"]
        found[name] = differs, list(moments.shape)
    return found


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("tp2", "pp2, tied", "fsdp2.tp2")]
)
def test_a_few_rows_of_a_frozen_table_move_and_no_others(pool, kind):
    layout = LAYOUTS[f"{kind}, some rows"]
    rows = sorted(rows_of(layout.changes["training.trainable_tokens"], Tokenizer()))
    for found in pool.run(layout.ranks, rows_moved, layout.changes):
        assert found or "pp" in kind
        assert all(moved == (rows, [len(rows), 64]) for moved in found.values()), found
