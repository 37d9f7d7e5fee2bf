"""The two phases of train_configs/llava: what each trains, and where the second begins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.__main__ import checked_job
from experiments.__main__ import main as train
from experiments.commands import main
from experiments.notebook import load_job, open_loader, open_model
from experiments.vlm.costs.rank_share import build_on_meta
from experiments.vlm.model_config import model_config
from tests.samples import photographs

REPOSITORY = Path(__file__).parents[2]
PHASES = ("1_projector", "2_finetune")
STAND_INS = ["--training.dataset", "llava", "--training.dataset_path", "embedded:llava_captions/heldout"]
SMALL = [
    "--training.steps",
    "2",
    "--training.seq_len",
    "256",
    "--data.packing_buffer_size",
    "2",
    "--metrics.no_save_plot",
]


def jobs(size: str) -> list:
    files = [REPOSITORY / "train_configs" / "llava" / f"{size}_{phase}.toml" for phase in PHASES]
    return [checked_job(["--job.config_file", str(file), "--job.dry_run", *STAND_INS], 8) for file in files]


@pytest.mark.usefixtures("repository_without_gpu")
@pytest.mark.parametrize("size", ["tiny", "7b", "13b"])
def test_the_first_trains_the_projector_on_captions_and_the_second_the_decoder_too_on_answers(size):
    first, second = jobs(size)
    assert second.model == first.model
    saved = f"{first.job.dump_folder}/{first.checkpoint.folder}"
    assert first.checkpoint.enable and second.checkpoint.initial_load_path == saved
    assert [job.data.sources[0].chat_template for job in (first, second)] == ["plain", "vicuna_v1"]
    trained = []
    for job in (first, second):
        named = build_on_meta(job, model_config(job), 1024).named_parameters()
        trained.append({name.partition(".")[0] for name, p in named if p.requires_grad})
    assert trained == [{"projector"}, {"projector", "decoder"}]
    if size != "tiny":
        found = [(j.training.steps, j.optimizer.lr, j.lr_scheduler.warmup_steps) for j in (first, second)]
        assert found == [(2180, 1e-3, 66), (5197, 2e-5, 156)]


@pytest.fixture
def phases(tmp_path, monkeypatch):
    """Two steps of each, in one folder; the losses of both."""
    monkeypatch.chdir(tmp_path)
    losses = []
    for phase in PHASES:
        name = f"llava/tiny_{phase}"
        assert train(["--job.config_file", name, *STAND_INS, *SMALL, "--metrics.log_freq", "1"]) == 0
        lines = (tmp_path / "outputs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if '"loss"' in line])
    return losses


def test_frozen_parts_keep_their_bits_and_the_second_begins_with_the_loss_of_the_firsts_last_model(phases):
    first, second = (load_job(f"outputs/llava/tiny_{phase}") for phase in PHASES)
    ends = [open_model(job) for job in (first, second)]
    begin = build_on_meta(first, model_config(first), 1024).to_empty(device="cpu")
    begin.init_weights(first.debug.seed)
    weights = [dict(model.named_parameters()) for model in (begin, *ends)]
    for kept, before, after in (("encoder", 0, 1), ("decoder", 0, 1), ("encoder", 1, 2)):
        names = [name for name in weights[0] if name.startswith(kept)]
        assert names
        for name in names:
            assert torch.equal(weights[before][name], weights[after][name]), name
    assert not torch.equal(weights[0]["projector.linear_1.weight"], weights[1]["projector.linear_1.weight"])
    assert not torch.equal(weights[1]["decoder.output.weight"], weights[2]["decoder.output.weight"])

    loader = open_loader(second)
    (batch,) = next(loader).batches
    with torch.no_grad():
        loss = ends[0](**batch.tensors)[0] / (batch.tensors["labels"] >= 0).sum()
    loader.close()
    torch.testing.assert_close(phases[1][0], loss.item(), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_both_run_from_one_command_each_and_transformers_says_what_we_say(tmp_path, capsys):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    for phase in PHASES:
        command = [sys.executable, "-m", "experiments", "--job.config_file", f"llava/tiny_{phase}"]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "outputs/llava/tiny_2_finetune"
    losses = [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").open()]
    assert losses[-1] < losses[0] - 3
    hf, picture, question = str(folder / "hf/step-60"), str(tmp_path / "coffee.png"), "What is it?"
    photographs()["coffee"].save(picture)
    asked = ["--image", picture, "--prompt", question]
    exact = ["--max_tokens", "12", "--training.mixed_precision_param", "float32"]
    assert main(["generate", "--hf", hf, *asked, *exact]) == 0
    processor = AutoProcessor.from_pretrained(hf)
    content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
    )
    theirs = LlavaForConditionalGeneration.from_pretrained(hf).generate(**inputs, max_new_tokens=12)
    said = processor.decode(theirs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == said.strip() != ""
