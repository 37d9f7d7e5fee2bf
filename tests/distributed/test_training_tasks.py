"""Tasks of a run that trains: what they find is what one process finds, and nothing of the run is changed."""

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from experiments.vlm.evaluate.tasks import TASKS
from tests.distributed.table import layout
from tests.reference.small_run import CPU, SMALL, job_of
from tests.samples import write_jsonl
from tests.tiny_data import Characters
from tests.unit.test_evaluate import write
from torchtitan.build import build
from torchtitan.generation.kv_cache import CachedAttention
from torchtitan.train import Trainer

SPEC = dataclasses.replace(SMALL, load_tokenizer=lambda job: Characters())
STEPS = 2
NAMES = ("vqa", "multiple_choice", "anls")


def trained(changes: dict[str, Any], folder: Path, tasks: list[str]) -> list[Tensor]:
    """Loss and norm of each step, this rank's weights after the last, and the state of the generator."""
    for name in NAMES:
        TASKS[name] = dataclasses.replace(TASKS[name], max_tokens=4)  # on this rank alone
    options = {"validation.enable": True, "validation.tasks": tasks, "validation.task_freq": 1}
    options["training.seq_len"] = 96  # as long as the longest prompt
    torch._dynamo.reset()
    trainer = Trainer(build(job_of(changes | options, str(folder)), SPEC, CPU))
    trainer.evaluator.run_tasks()
    # Garbage is collected every so many steps alone, and the cache is gone already.
    assert not gc.isenabled() and not any(isinstance(it, CachedAttention) for it in gc.get_objects())
    found = []
    for step in range(1, STEPS + 1):
        assert trainer.train_step()
        found += [trainer.loss.clone(), trainer.grad_norm.clone()]
        if step < STEPS:
            trainer.pause(step)
    (model,) = trainer.run.forward_backward.parts
    assert all(module.training for module in model.modules())
    trainer.close()
    weights = [parameter.detach() for parameter in trainer.run.state.optimizers.parameters]
    found += [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return [*found, torch.get_rng_state()]


def train_on_rank(changes: dict[str, Any], folder: str, tasks: list[str], without: bool) -> None:
    """With tasks; and without, whose figures have to be the same bit by bit on each rank."""
    changes = changes | {"data.cache_folder": folder + "/cache"}
    found = trained(changes, Path(folder) / "with", tasks)
    if without:
        expected = trained(changes, Path(folder) / "without", [])
        assert len(found) == len(expected) > 2 * STEPS + 10
        assert all(map(torch.equal, found, expected))


def lines(folder: Path, step: int) -> dict[str, list[dict]]:
    at = folder / "with" / "tasks" / f"step-{step}"
    return {
        name: [json.loads(line) for line in (at / f"{name}.jsonl").read_text().splitlines()] for name in NAMES
    }


@pytest.fixture(scope="module")
def alone(pool, tmp_path_factory):
    """The tasks, and (model) -> what one process finds; of two ranks one has no record of the last task."""
    folder = tmp_path_factory.mktemp("alone")
    five, one = Path(write(folder, "jsonl")), folder / "one.jsonl"
    records = [json.loads(line) for line in five.read_text().splitlines()]
    for times, record in enumerate(records, start=1):
        record["question"] *= min(
            times, 4
        )  # some end in the second half of the width that they are padded to
    write_jsonl(five, records)
    one.write_text(five.read_text().splitlines()[0] + "\n")
    tasks, found = [f"vqa={five}", f"multiple_choice={five}", f"anls={one}"], {}

    def of(model: str) -> dict[str, list[dict]]:
        if model not in found:
            pool.run(1, train_on_rank, {"model.flavor": model}, str(folder / model), tasks, False)
            found[model] = lines(folder / model, 0)
        return found[model]

    return tasks, of


DROPOUT = {"lora.dropout": 0.5, "lora.alpha": 64.0}
LAYOUTS = [
    layout("fsdp2, lora with dropout", 2, lora=4),
    layout("tp2, onevision, shared encoder", 2, tp=2, slots=4, sharing="on", model="small-onevision"),
    layout("cp2", 2, cp=2),
    layout("cp2, ulysses, shared encoder", 2, cp=2, rows=2, sharing="on", method="ulysses"),
    layout("replicate2, muon, never resharding", 2, replicate=2, reshard="never", optimizer="Muon"),
    layout("fsdp2, compile, checkpointing", 2, compile=True, ac="selective"),
    layout("fsdp2, offload to the CPU", 2, offload=True),
    layout("fsdp2.tp2, encoder heads, tied", 4, tp=2, heads=True, model="small-qwen2"),
    layout("tp2.cp2, shared encoder", 4, tp=2, cp=2, slots=4, sharing="on"),
]
QUICK = ("fsdp2, lora with dropout",)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in QUICK else pytest.mark.slow)
        for case in LAYOUTS
    ],
)
def test_tasks_change_nothing_and_find_what_one_process_finds(pool, tmp_path, alone, case):
    tasks, found_alone = alone
    changes = case.changes | (DROPOUT if "lora.rank" in case.changes else {})
    pool.run(case.ranks, train_on_rank, changes, str(tmp_path), tasks, True)
    # Before the first step: adapters add nothing yet, and weights are the same in all layouts.
    found, expected = lines(tmp_path, 0), found_alone(changes.get("model.flavor", "small-qwen3"))
    assert [len(found[name]) for name in NAMES] == [5, 5, 1]
    assert found["vqa"] == expected["vqa"] and found["anls"] == expected["anls"]
    for ours, theirs in zip(found["multiple_choice"], expected["multiple_choice"], strict=True):
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=2e-4)
        assert ours["tokens"] == theirs["tokens"] and ours["scores"] == theirs["scores"]
    later = lines(tmp_path, 1)["multiple_choice"]
    assert all(
        line["logprobs"] != before["logprobs"]
        for line, before in zip(later, found["multiple_choice"], strict=True)
    )
