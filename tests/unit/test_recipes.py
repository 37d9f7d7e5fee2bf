"""The stages of train_configs/stages: each starts from the last output of the one before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import checked_job
from experiments.vlm.costs.rank_share import build_on_meta
from experiments.vlm.model_config import model_config
from tests.reference import hf_processor
from tests.samples import photographs
from torchtitan.components.parameter_groups import settings

REPOSITORY = Path(__file__).parents[2]
STAGES = REPOSITORY / "train_configs" / "stages"
SETS = ("small", "so400m_llama3.2_3b", "so400m_qwen3_4b")
NAMES = ("1_align", "2_pretrain", "3_instruct")
# A large model differs from a small one in what is not looked at here.
STAND_INS = ["--training.dataset", "cc12m", "--training.dataset_path", "embedded:captions/train"]
pytestmark = pytest.mark.usefixtures("repository_without_gpu")


def jobs(name: str) -> list:
    options = ["--job.dry_run"] if name == "small" else ["--job.dry_run", *STAND_INS]
    files = [STAGES / f"{name}_{stage}.toml" for stage in NAMES]
    return [checked_job(["--job.config_file", str(file), *options], 8) for file in files]


@pytest.mark.parametrize("name", SETS)
def test_a_stage_starts_where_the_one_before_ends(name):
    stages = jobs(name)
    for before, after in zip(stages, stages[1:], strict=False):
        assert before.checkpoint.enable and after.model == before.model
        saved = f"{before.job.dump_folder}/{before.checkpoint.folder}"
        assert after.checkpoint.initial_load_path == saved


@pytest.mark.parametrize("name", SETS)
def test_patterns_of_a_stage_match_its_model(name):
    trained = []
    for job in jobs(name):
        model = build_on_meta(job, model_config(job), 1024)
        assert settings(model, job.optimizer)
        trained.append({n for n, p in model.named_parameters() if p.requires_grad})
    assert {name.partition(".")[0] for name in trained[0]} == {"projector", "decoder"}
    assert {name for name in trained[0] if name.startswith("decoder")} <= set(model.TOKEN_TABLES)
    assert trained[0] < trained[1] and {n for n in trained[1] if not n.startswith("encoder")} == trained[2]


@pytest.mark.slow
def test_the_small_stages_run_from_one_command_line_each_and_the_last_answers_in_transformers(tmp_path):
    for stage in NAMES:
        command = [sys.executable, "-m", "experiments", "--job.config_file", f"stages/small_{stage}"]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    losses = [
        [record["loss"] for line in (tmp_path / f"outputs/stages/small_{stage}/metrics.jsonl").open()
         if "loss" in (record := json.loads(line))]
        for stage in NAMES
    ]  # fmt: skip
    assert all(each[-1] < each[0] - 1 for each in losses[1:])
    (folder,) = (tmp_path / "outputs/stages/small_3_instruct/hf").iterdir()
    photographs()["coffee"].save(tmp_path / "coffee.png")
    content = [
        {"type": "image", "path": str(tmp_path / "coffee.png")},
        {"type": "text", "text": "What is it?"},
    ]
    asked = {"messages": [{"role": "user", "content": content}], "add_generation_prompt": True, "answer": 4}
    (found,) = hf_processor.processed([(str(folder), asked)], tmp_path)
    assert len(found["answer"]) > 0
