"""What DRY_RUN tells of a job whose tokenizer is not here, and of a tokenizer that is hardly the model's."""

from types import SimpleNamespace

import pytest

from experiments.__main__ import checked_job
from experiments.vlm.costs.estimate import estimate
from experiments.vlm.spec import SPEC
from experiments.vlm.weights import embedding_rows
from experiments.vlm.weights.embedding_rows import rows_of
from torchtitan import dry_run as looked
from torchtitan.config.errors import ConfigError
from torchtitan.config.layout import degrees

JOB = [
    "--training.dataset",
    "cc12m",
    "--training.dataset_path",
    "embedded:captions/train",
    "--model.flavor",
    "base-llama3.2-1B",
]
JOB += ["--training.steps", "1000", "--training.local_batch_size", "2", "--model.tokenizer_path", "nowhere"]


@pytest.fixture
def told(caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(looked, "memory_gib", lambda device: 8.0)
    with caplog.at_level("INFO", logger="torchtitan"):
        looked.dry_run(
            checked_job([*JOB, "--job.dry_run", "--job.dump_folder", str(tmp_path / "out")], 4), SPEC
        )
    return caplog.messages


def test_layout_memory_and_tokens_are_told_without_the_tokenizer(told):
    assert "layout: fsdp4" in told
    assert "tokens of the run: 16,384,000, in 1,000 steps of 8 slots of 2,048 tokens" in told
    # 1,332,153,600 parameters, with a table of 128,256 rows once: four float32 numbers each, over four ranks.
    assert "weights, gradients and AdamW state: 4.96 GiB a rank" in told
    assert "it does not fit this machine: 8.0 GiB of cpu memory a rank" in told
    assert any(line.startswith("peak memory: ") for line in told)
    assert any("nowhere is not here: vocabulary as published, and no batch was read" in line for line in told)


def test_the_recipe_to_start_from_fits_24_gb_with_nothing_downloaded(caplog, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(looked, "memory_gib", lambda device: 24e9 / 2**30)
    job = ["--job.config_file", "vlm", "--job.dry_run"]
    with caplog.at_level("INFO", logger="torchtitan"):
        looked.dry_run(checked_job(job, 1), SPEC)
    said = "\n".join(caplog.messages)
    assert "encoder 85,843,200, projector 4,202,496, decoder 596,049,920" in said
    assert "it fits this machine: 22.4 GiB of cpu memory a rank" in said
    fetched = "python scripts/download_hf_assets.py Qwen/Qwen3-0.6B --out assets/Qwen3-0.6B"
    assert f"vocabulary as published, and no batch was read; get it with `{fetched}`" in said
    assert "checkpoint.initial_load_encoder_path = assets/siglip2-base-patch16-naflex" in said
    assert "data.sources[1].path = datasets/obelics/*.tar: no such file or folder" in said
    job = checked_job(job, 1)
    assert estimate(job, degrees(job.parallelism, 1), rows_of(job, None)).memory.total < 20 * 2**30


@pytest.mark.parametrize("there", ["", "tokenizer", "tokenizer weights"])
def test_the_recipe_to_start_from_says_first_what_is_missing(there, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "tokenizer" in there:
        (tmp_path / "assets/Qwen3-0.6B").mkdir(parents=True)
        (tmp_path / "assets/Qwen3-0.6B/tokenizer.json").write_text("{}")
    if "weights" in there:
        (tmp_path / "assets/siglip2-base-patch16-naflex").mkdir()
    missing = "google/siglip2-base-patch16-naflex" if there else "Qwen/Qwen3-0.6B"
    with pytest.raises(ConfigError) as caught:
        checked_job(["--job.config_file", "vlm"], 1)
    assert f"`python scripts/download_hf_assets.py {missing} --out " in str(caught.value)


def test_training_needs_the_tokenizer():
    with pytest.raises(ConfigError, match="model.tokenizer_path = nowhere: no such file"):
        checked_job(JOB, 4)


@pytest.mark.parametrize(
    ("ids", "line"),
    [
        (128256, None),
        (127000, None),
        (
            128320,
            "has 128,320 ids, model.flavor = base-llama3.2-1B 128,256 rows: the embedding is enlarged by 64 "
            "rows",
        ),
        (1024, "127,232 of them stand for nothing; is this the model's own tokenizer?"),
    ],
)
def test_a_tokenizer_that_is_hardly_the_models_is_told(ids, line, caplog, monkeypatch):
    monkeypatch.setattr(embedding_rows, "load_tokenizer", lambda path: SimpleNamespace(vocab_size=ids))
    job = checked_job([*JOB, "--job.dry_run"], 1)
    with caplog.at_level("INFO", logger="torchtitan"):
        embedding_rows.open_tokenizer(job)
    assert not caplog.messages if line is None else line in caplog.messages[0]
    assert embedding_rows.rows_of(job, SimpleNamespace(vocab_size=ids)) == max(ids, 128256)


def test_the_debug_model_takes_the_tokenizer_of_the_repository_without_a_word(caplog):
    job = checked_job(["--job.config_file", "train_configs/vlm_debug.toml"], 1)
    with caplog.at_level("INFO", logger="torchtitan"):
        tokenizer = embedding_rows.open_tokenizer(job)
    assert not caplog.messages and embedding_rows.rows_of(job, tokenizer) == tokenizer.vocab_size == 1024
