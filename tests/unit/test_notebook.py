"""What a notebook takes from experiments/notebook.py is what the commands work with."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from experiments.__main__ import main as train
from experiments.commands import main
from experiments.notebook import load_job, open_loader, open_model, show_batch
from torchtitan.config.errors import ConfigError

SMALL = [
    "--training.steps", "2", "--training.seq_len", "256", "--data.patches_per_row", "256",
    "--data.max_patches_per_image", "64", "--data.packing_buffer_size", "16", "--metrics.log_freq", "1",
    "--metrics.no_enable_tensorboard", "--metrics.no_save_plot",
    "--validation.no_enable", "--validation.no_controls", "--data.num_workers", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps, each saved."""
    folder = tmp_path_factory.mktemp("run")
    saved = ["--job.dump_folder", str(folder), "--checkpoint.enable", "--checkpoint.interval", "1"]
    assert train(["--job.config_file", "vlm_debug", *SMALL, *saved]) == 0
    return folder


@pytest.fixture
def loader(run):
    loader = open_loader(load_job(str(run)))
    yield loader
    loader.close()


def test_batches_and_model_of_a_run_give_the_loss_that_it_logged(run, loader):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["loss"] for line in lines if "loss" in line}
    next(loader)
    model, loss, weight = open_model(load_job(str(run)), "step-1"), 0.0, 0
    for batch in next(loader).batches:
        loss += model(**batch.tensors)[0].item()
        weight += batch.counts["loss_tokens"]
    assert loss / weight == pytest.approx(logged[2], rel=1e-5)


def test_looking_leaves_the_folder_of_the_run_as_it_is(run):
    before = sorted(run.rglob("*"))
    job = load_job(str(run))
    loader = open_loader(job)
    next(loader)
    loader.close()
    open_model(job)
    assert sorted(run.rglob("*")) == before and job == load_job(str(run))


def test_an_exported_folder_is_opened_as_its_checkpoint_is(run, loader, tmp_path, capsys):
    command = [
        "to_hf",
        "--job.dump_folder",
        str(run),
        "--checkpoint",
        "step-2",
        "--out",
        str(tmp_path / "hf"),
    ]
    assert main(command) == 0
    batch = next(loader).batches[0]
    found, expected = (
        open_model(load_job(str(folder)))(**batch.tensors, per_token=True)
        for folder in (tmp_path / "hf", run)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_picture_shows_the_batch_and_leaves_the_notebooks_backend_alone(loader, figures):
    before, batch = matplotlib.get_backend(), next(loader).batches[0]
    picture = show_batch(loader, batch)
    assert picture.format == "PNG" and matplotlib.get_backend() == before
    slot, _ = figures[0].subfigs
    _, _, *images, _ = slot.axes
    first = batch.tensors["pixel_values"][0, 0].numpy().reshape(16, 16, 3)
    assert any(np.array_equal(axes.images[0].get_array()[:16, :16], first) for axes in images)
    assert slot.get_suptitle().startswith("slot 0: ")


def test_importing_it_imports_no_torch():
    seen = "import sys, experiments.notebook; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", seen]).returncode == 0


def test_what_cannot_be_is_told_in_a_line(run, tmp_path):
    with pytest.raises(ConfigError, match="no run"):
        load_job(str(tmp_path))
    with pytest.raises(ConfigError, match="training.sequence"):
        load_job("vlm_debug", "--training.sequence", "3")
    job = load_job("vlm_debug", "--job.dump_folder", str(tmp_path))
    with pytest.raises(ConfigError, match="no checkpoint in"):
        open_model(job)
    job.data.patches_per_row = 13
    with pytest.raises(ConfigError, match="data.patches_per_row = 13"):
        open_loader(job)
    with pytest.raises(ConfigError, match="split = 'test': must be train or validation"):
        open_loader(load_job("vlm_debug"), split="test")


@pytest.mark.parametrize(
    "field, value, told",
    [
        ("seqlen", 256, "training.seqlen is not a known option; did you mean training.seq_len?"),
        ("seq_len", "256", "training.seq_len = '256': expected a whole number"),
        ("seq_len", None, "training.seq_len = None: expected a whole number"),
    ],
)
def test_a_field_that_no_option_allows_is_told_in_a_line(field, value, told):
    job = load_job(Path("train_configs/vlm_debug.toml"), "--training.seq_len", 256)
    assert job.training.seq_len == 256
    setattr(job.training, field, value)
    with pytest.raises(ConfigError) as error:
        open_loader(job)
    assert str(error.value) == told
