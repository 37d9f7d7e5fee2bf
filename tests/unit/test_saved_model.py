"""What a run left is used as it is, whatever the run once started from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.vlm import saved_model
from experiments.vlm.config import VLMCheckpoint, VLMJobConfig
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model_config import model_config
from experiments.vlm.saved_model import use_checkpoint, use_hf_folder, with_saved
from torchtitan.components.checkpoint_folder import find_initial
from torchtitan.components.checkpoint_read import require_sizes
from torchtitan.components.train_state import as_record
from torchtitan.config.errors import ConfigError

TRAINED = replace(FLAVORS["debugmodel"], decoder=replace(FLAVORS["debugmodel"].decoder, layers=2))


def run_of(folder: Path) -> VLMJobConfig:
    """It began with a Hugging Face folder that is gone, and has two checkpoints."""
    job = VLMJobConfig()
    job.job.dump_folder = str(folder)
    job.checkpoint.initial_load_in_hf = True
    job.checkpoint.initial_load_path = job.checkpoint.initial_load_encoder_path = str(folder / "gone")
    for step in (2, 10):
        path = folder / "checkpoint" / f"step-{step}"
        path.mkdir(parents=True)
        (path / "train_state.json").write_text(json.dumps({"step": step, "model": as_record(TRAINED)}))
    return job


@pytest.mark.parametrize("name, step", [("", 10), ("step-2", 2)])
def test_a_checkpoint_takes_the_place_of_what_the_run_started_from(tmp_path, name, step):
    job = run_of(tmp_path)
    assert use_checkpoint(job, name) == tmp_path / "checkpoint" / f"step-{step}"
    assert model_config(job) == TRAINED
    assert not job.checkpoint.initial_load_in_hf


def test_a_checkpoint_is_found_by_its_path_and_a_missing_one_is_named(tmp_path):
    run_of(tmp_path)
    elsewhere = VLMJobConfig()
    elsewhere.model.flavor = "so400m-llama3.2-1B"  # the checkpoint knows better
    elsewhere.job.dump_folder = str(tmp_path / "other")
    use_checkpoint(elsewhere, str(tmp_path / "checkpoint" / "step-2"))
    assert model_config(elsewhere) == TRAINED
    with pytest.raises(
        ConfigError, match="--checkpoint step-3: no complete checkpoint; in .*: step-2, step-10"
    ):
        use_checkpoint(run_of(tmp_path / "again"), "step-3")
    elsewhere.job.dump_folder = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no checkpoint in .*nowhere"):
        use_checkpoint(elsewhere, "")


def test_a_run_that_goes_on_keeps_the_model_of_its_checkpoint(tmp_path):
    """Not that of a flavor, or of folders that may be gone."""
    job = run_of(tmp_path)
    job.checkpoint.enable, job.model.flavor = True, "debugmodel"
    assert model_config(job) == TRAINED
    job.checkpoint = VLMCheckpoint()
    assert model_config(job) == FLAVORS["debugmodel"]


def test_the_saved_configuration_holds_where_none_is_named(tmp_path):
    argv = ["--job.dump_folder", str(tmp_path), "--prompt", "x"]
    assert with_saved(argv) == argv and with_saved([]) == []
    (tmp_path / "config.toml").write_text("")
    assert with_saved(argv) == ["--job.config_file", str(tmp_path / "config.toml"), *argv]
    for spelled in (f"--job.dump_folder={tmp_path}", f"--job.dump-folder={tmp_path}"):
        assert with_saved([spelled]) == ["--job.config_file", str(tmp_path / "config.toml"), spelled]
    for named in (["--job.config_file", "vlm_debug", *argv], ["--job.config-file=vlm_debug", *argv]):
        assert with_saved(named) == named


@pytest.mark.parametrize("spelled", ["--data.max_patches_per_image", "--data.max-patches-per-image"])
def test_a_folder_sets_the_limits_of_images_where_the_command_line_does_not(tmp_path, monkeypatch, spelled):
    read = []
    monkeypatch.setattr(saved_model, "read_image_limits", lambda folder, job: read.append(folder))
    monkeypatch.setattr(saved_model, "make_room", lambda job, given: None)
    use_hf_folder(VLMJobConfig(), str(tmp_path), [spelled, "64"])
    use_hf_folder(VLMJobConfig(), str(tmp_path), [f"{spelled}=64"])
    assert not read
    use_hf_folder(VLMJobConfig(), str(tmp_path), ["--prompt", "x"])
    assert read == [tmp_path]


def test_a_hugging_face_folder_that_is_given_as_a_checkpoint_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="that is a Hugging Face folder, set checkpoint.initial_load_in_hf"):
        find_initial(VLMCheckpoint(initial_load_path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("layers.0.wq.weight", "a tokenizer of another size"),
        ("layers.0.wq.lora.A.weight", "lora.rank"),
        ("optimizer.tok_embeddings.weight.exp_avg", "another training.trainable_tokens"),
    ],
)
def test_a_tensor_of_another_shape_is_told_with_the_options_that_make_it(name, other):
    with pytest.raises(ConfigError, match=other):
        require_sizes({name: torch.Size([4, 2])}, {name: torch.Size([8, 2])})


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("optimizer.encoder.weight.exp_avg", "another optimizer.name or training.freeze"),
        ("model.layers.0.wq.weight", "another model.flavor$"),
        ("model.layers.0.wq.lora.A.weight", r"another \[lora\]"),
    ],
)
def test_a_tensor_that_is_missing_is_told_with_the_options_that_make_it(name, other):
    with pytest.raises(ConfigError, match=f"has no {name}: it was made with {other}"):
        require_sizes({name: (4, 2)}, {})
