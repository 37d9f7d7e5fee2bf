"""A run that was saved under one layout goes on under another as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import Pool
from tests.distributed.table import layout
from tests.distributed.world import SLOTS, TEST_SPEC, device, job_of
from torchtitan.build import build
from torchtitan.distributed.collectives import sum_over_ranks
from torchtitan.train import Trainer

STEPS, SAVED = 5, 2
TOLERANCE = 1e-5


def train(changes: dict[str, Any], folder: str, until: int) -> list[tuple[float, float]]:
    """Loss and norm of each step from the latest checkpoint in `folder` to `until`, and a checkpoint there."""
    job = job_of({"checkpoint.enable": True} | changes, folder)
    trainer = Trainer(build(job, TEST_SPEC, device()))
    seen = []
    while trainer.state.step < until:
        assert trainer.train_step()
        seen.append((float(sum_over_ranks(trainer.loss)) / trainer.run.mesh.degrees.tp, float(trainer.grad_norm)))
    trainer.save()
    trainer.close()
    return seen


TIED = {"model": "layouts-qwen3-tied"}
FSDP_TP = layout("fsdp2.tp2", 4, tp=2)
PP_CP = layout("cp2.pp2", 4, cp=2, pp=2)
PAIRS = [
    (FSDP_TP, PP_CP),
    (layout("pp2, ZBVZeroBubble, tied", 2, pp=2, schedule="ZBVZeroBubble", **TIED), layout("tp2, tied", 2, tp=2, **TIED)),
]
FURTHER = [
    (PP_CP, FSDP_TP),
    (layout("fsdp2.tp2, muon", 4, tp=2, optimizer="Muon"), layout("pp2, muon", 2, pp=2, optimizer="Muon")),
    (layout("fsdp2, tied", 2, **TIED), layout("tp2.cp2.pp2, interleaved, tied", 8, tp=2, cp=2, pp=2, schedule="Interleaved1F1B", **TIED)),
    (layout("pp4", 4, pp=4), layout("one", 1)),
    (layout("tp2, encoder heads", 2, tp=2, heads=True), layout("replicate2.cp2", 4, replicate=2, cp=2)),
]


def goes_on(pool: Pool, folder: Path, before, after) -> None:
    task = {key: value for key, value in before.changes.items() if key in ("model.flavor", "optimizer.name")}
    straight = pool.run(1, train, task | {"training.local_batch_size": SLOTS}, str(folder / "straight"), STEPS)[0]
    pool.run(before.ranks, train, before.changes, str(folder / "run"), SAVED)
    rest = pool.run(after.ranks, train, after.changes, str(folder / "run"), STEPS)
    assert all(each == rest[0] for each in rest), "global figures are the same on every rank"
    assert len(rest[0]) == STEPS - SAVED
    for found, expected in zip(rest[0], straight[SAVED:], strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(("before", "after"), [pair for pair in PAIRS if all(each.runs for each in pair)], ids=lambda each: each.name)
def test_a_run_goes_on_under_another_layout(pool, tmp_path, before, after):
    goes_on(pool, tmp_path, before, after)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), FURTHER, ids=lambda each: each.name)
def test_a_run_goes_on_under_further_layouts(pool, tmp_path, before, after):
    goes_on(pool, tmp_path, before, after)
