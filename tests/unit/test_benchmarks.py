"""Benchmarks are run by hand; what they import is held by this, and what they compare us with."""

import argparse
import importlib
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.text_decoder import require_torchtitan, row_of, sizes_of, text_job
from benchmarks.train_job import batches_of
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.spec import SPEC
from torchtitan.config.errors import UserError
from torchtitan.models.decoder.flavors import DECODERS

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_benchmark_finds_what_it_imports(file):
    importlib.import_module(f"benchmarks.{file.stem}")


@pytest.mark.parametrize("name", [name for name in DECODERS if "llama" in name] + ["debug"])
def test_torchtitans_rule_for_the_feed_forward_gives_our_width(name):
    config, sizes = DECODERS[name], sizes_of(DECODERS[name], 8192)["sizes"]
    hidden = int(sizes["ffn_dim_multiplier"] * int(2 * 4 * config.dim / 3))
    multiple = sizes["multiple_of"]
    assert multiple * ((hidden + multiple - 1) // multiple) == config.mlp_dim


@mock.patch.dict(FLAVORS)  # the job registers one
def test_each_row_of_text_is_one_document(tmp_path):
    options = argparse.Namespace(flavor="debugmodel", slots=2, accumulation=2)
    job = text_job(options, ["--training.seq_len", "64", "--data.num_workers", "0"], tmp_path)
    for batches in batches_of(job, SPEC.load_tokenizer(job), 3):
        for batch in batches:
            assert batch.counts["tokens"] == 2 * 64
            tokens, labels = row_of(batch.tensors)
            assert labels[:, :-1].equal(tokens[:, 1:])


@pytest.mark.parametrize(
    ("folder", "flavor", "told"),
    [
        (None, "debugmodel", "pip install --no-deps --target FOLDER torchtitan=="),
        (".", "base-qwen3-0.6B", "Llama 3"),
    ],
)
def test_what_cannot_be_compared_with_torchtitan_is_told_before(tmp_path, folder, flavor, told):
    (tmp_path / "torchtitan-0.2.2.dist-info").mkdir()
    with pytest.raises(UserError, match=told):
        require_torchtitan(folder and tmp_path / folder, flavor)
