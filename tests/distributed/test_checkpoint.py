"""A run that was saved under one layout goes on under another; what is written is whole or not there."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.layouts import Layout, Measured, train
from tests.distributed.pool import Pool
from tests.distributed.table import LORA, Comparison, layout
from tests.reference.small_run import CPU, SMALL, job_of, whole
from torchtitan.build import build
from torchtitan.components import checkpoint
from torchtitan.config.errors import CheckpointError, ConfigError
from torchtitan.train import Trainer

STEPS, SAVED = 5, 2
TOLERANCE = 1e-5

TIED = {"model": "small-qwen3-tied"}
FSDP_TP = layout("fsdp2.tp2", 4, tp=2)
PP_CP = layout("cp2.pp2", 4, cp=2, pp=2)
ONE = layout("one", 1)
ADAPTED = {"lora": 4, "adapted": ["decoder"]}  # of which a stage with the encoder alone has nothing
PAIRS = [
    (
        layout("pp2, split by hand, lora", 2, pp=2, split=[2], **ADAPTED),
        layout("pp2, encoder stage, lora", 2, pp=2, encoder_stage=True, **ADAPTED),
    ),
]
FURTHER = [
    (layout("fsdp2", 2), ONE),
    (layout("fsdp2.tp2, lora", 4, tp=2, **LORA), layout("cp2.pp2, lora", 4, cp=2, pp=2, **LORA)),
    (FSDP_TP, PP_CP),
    (
        layout("pp2, ZBVZeroBubble, tied", 2, pp=2, schedule="ZBVZeroBubble", **TIED),
        layout("tp2, tied", 2, tp=2, **TIED),
    ),
    (PP_CP, FSDP_TP),
    (
        layout("fsdp2, llava", 2, model="small-llava"),
        layout("tp2, llava, encoder heads", 2, model="small-llava", tp=2, heads=True),
    ),
    (layout("fsdp2.tp2, muon", 4, tp=2, optimizer="Muon"), layout("pp2, muon", 2, pp=2, optimizer="Muon")),
    (
        layout("fsdp2, tied", 2, **TIED),
        layout("tp2.cp2.pp2, interleaved, tied", 8, tp=2, cp=2, pp=2, schedule="Interleaved1F1B", **TIED),
    ),
    (layout("pp4", 4, pp=4), ONE),
    (
        layout("fsdp2.tp2, some rows", 4, tp=2, freeze=["embeddings"], tokens=["new"], **TIED),
        layout("pp2, some rows", 2, pp=2, freeze=["embeddings"], tokens=["new"], **TIED),
    ),
    (ONE, layout("fsdp4", 4)),
    (layout("tp2, encoder heads", 2, tp=2, heads=True), layout("replicate2.cp2", 4, replicate=2, cp=2)),
]


@pytest.fixture(scope="module")
def straight():
    """Runs of one process that nothing interrupted, one for each task."""
    return Comparison(steps=STEPS, validate=False)


def go_on(pool: Pool, folder: Path, before: Layout, after: Layout) -> Measured:
    """The steps after the change."""
    for case, until in ((before, SAVED), (after, STEPS)):
        found = pool.run(
            case.ranks,
            train,
            case.changes | {"checkpoint.enable": True},
            case.ranks,
            until,
            False,
            str(folder),
        )[0]
    return found


def ask_for_other_adapters(changes: dict, folder: str) -> list[str]:
    """Why a run cannot go on with them, as this rank says it."""
    errors = []
    for other in ({"lora.alpha": 64.0}, {"lora.patterns": ["encoder", "decoder"]}):
        with pytest.raises(ConfigError) as refused:
            build(job_of(changes | other | {"checkpoint.enable": True}, folder), SMALL, CPU)
        errors.append(str(refused.value))
    return errors


def assert_goes_on(found: Measured, straight: Measured) -> None:
    assert len(found.losses) == STEPS - SAVED
    assert found.losses == pytest.approx(straight.losses[SAVED:], rel=TOLERANCE)
    assert found.norms == pytest.approx(straight.norms[SAVED:], rel=TOLERANCE)


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda each: each.name)
def test_a_run_goes_on_under_another_layout(pool, straight, tmp_path, before, after):
    assert_goes_on(go_on(pool, tmp_path, before, after), straight.reference(before))
    one, other = pool.run(after.ranks, ask_for_other_adapters, after.changes, str(tmp_path))
    assert one == other and "give lora.alpha as it was" in one[0] and "has no model.encoder" in one[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [pair for pair in FURTHER if all(each.runs for each in pair)],
    ids=lambda each: each.name,
)
def test_a_run_goes_on_under_further_layouts(pool, straight, tmp_path, before, after):
    assert_goes_on(go_on(pool, tmp_path, before, after), straight.reference(before))


def save_then_spoil(folder: str, async_mode: str) -> bool:
    """Save, and change every weight and moment at once, as training would: is what was saved as before?"""
    changes = {"checkpoint.enable": True, "checkpoint.async_mode": async_mode, "checkpoint.interval": 100}
    trainer = Trainer(build(job_of(changes, folder), SMALL, CPU))
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
    return before.keys() == after.keys() and all(
        torch.equal(tensor, whole(after[name])) for name, tensor in before.items()
    )


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_a_checkpoint_holds_the_state_at_the_time_of_saving(pool, tmp_path, async_mode):
    assert pool.run(2, save_then_spoil, str(tmp_path), async_mode) == [True, True]


def validate_then_save(folder: str) -> bool:
    """Whether a checkpoint holds the same right after a validation as before it, tensor for tensor."""
    trainer = Trainer(build(job_of({}, folder), SMALL, CPU))
    trainer.train_step()
    before = {name: whole(tensor) for name, tensor in trainer.state.tensors(False).items()}
    trainer.run.validator.evaluate()
    after = {name: whole(tensor) for name, tensor in trainer.state.tensors(False).items()}
    trainer.close()
    return before.keys() == after.keys() and all(
        torch.equal(after[name], tensor) for name, tensor in before.items()
    )


def test_validation_changes_nothing_that_a_checkpoint_holds(pool, tmp_path):
    assert pool.run(2, validate_then_save, str(tmp_path)) == [True, True]


def fail_while_writing(folder: str) -> list[str]:
    """What is left in the folder after a write that broke off in the middle."""
    trainer = Trainer(build(job_of({"checkpoint.enable": True}, folder), SMALL, CPU))
    trainer.train_step()
    plain, checkpoint.dcp.save = checkpoint.dcp.save, _write_half
    try:
        with pytest.raises(CheckpointError, match="no space left on device"):
            trainer.run.checkpointer.save()
    finally:
        checkpoint.dcp.save = plain
        trainer.close()
    return [path.name for path in (Path(folder) / "checkpoint").iterdir()]


def _write_half(tensors, storage_writer) -> None:
    (Path(storage_writer.path) / "__0_0.distcp").write_bytes(b"half")
    raise OSError("no space left on device")


def test_a_write_that_breaks_off_leaves_no_checkpoint(pool, tmp_path):
    assert pool.run(1, fail_while_writing, str(tmp_path)) == [[]]
