"""The advisor simulates what the loader then does."""

import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.commands import main
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.packing import Budget
from experiments.vlm.data.setup import make_setup
from experiments.vlm.view.advice_picture import draw_advice
from experiments.vlm.view.packing_advice import (
    Stream,
    advise,
    fitting_budget,
    patches_per_token,
    read_documents,
    simulate,
)
from tests.tiny_data import Characters, make_job, write_all


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def test_sizes_are_those_of_the_delivered_samples(data, tmp_path):
    job = make_job(data, tmp_path, epochs=1)
    documents = read_documents(make_setup(job, Characters(), "train", 1), limit=1000).documents
    assert len(documents) == 102
    loader = Loader(job, Characters())
    counts = [step.batches[0].counts for step in loader]
    loader.close()
    assert sum(tokens for document in documents for tokens, _ in document) == sum(
        count["tokens"] for count in counts
    )
    assert sum(patches for document in documents for _, patches in document) == sum(
        count["patches"] for count in counts
    )
    assert sum(patches > 0 for document in documents for _, patches in document) == sum(
        count["images"] for count in counts
    )


def test_the_simulation_is_what_the_loader_packs(data, tmp_path):
    """One slot, the same documents in the same order: the same rows."""
    job = make_job(data, tmp_path, local_batch_size=1)
    stream = read_documents(make_setup(job, Characters(), "train", 1), limit=400)
    seen = simulate(stream, Budget(256, 1, 256), buffer=16, merge=2)
    loader = Loader(job, Characters())
    first = seen.rows // 3  # rows before those that are counted
    counts = [step.batches[0].counts for _, step in zip(range(first + seen.rows), loader, strict=False)][
        first:
    ]
    loader.close()
    assert np.mean([count["tokens"] for count in counts]) / 256 == pytest.approx(seen.tokens, abs=0.004)
    assert np.mean([count["patches"] for count in counts]) / 256 == pytest.approx(seen.patches, abs=0.004)


def test_a_row_is_as_long_as_the_patches_per_token_ask_for():
    documents = [[(10, 0), (27, 100)], [(63, 0)]]
    assert patches_per_token(documents) == 1.0
    assert fitting_budget(1000, 1, 1.5, merge=2, largest_image=64) == Budget(1000, 1, 1500)
    assert fitting_budget(1000, 3, 1.5, merge=2, largest_image=64) == Budget(1000, 3, 500)
    assert fitting_budget(100, 1, 0.1, merge=2, largest_image=64) == Budget(100, 1, 64)


def test_the_advised_row_fills_both_sides():
    random = np.random.default_rng(0)
    documents = [
        [(int(text), 0), (int(visual) + 2, 4 * int(visual))]
        for text, visual in random.integers([5, 10], [60, 200], (1200, 2))
    ]
    seen = advise(
        Stream(documents, [0] * len(documents)), 2048, 1, 256, merge=2, largest_image=800, patch_cost=1.0
    )
    assert seen.tokens > 0.98 and seen.patches > 0.96 and seen.longest_wait <= 256


def test_the_picture_shows_what_was_counted(tmp_path, figures):
    documents = [[(20, 0), (27, 100)], [(63, 0)]] * 400
    seen = [simulate(Stream(documents, [0] * 800), Budget(256, 1, 512), buffer, 2) for buffer in (32, 64)]
    draw_advice(documents, seen, str(tmp_path / "advice.png"))
    assert (tmp_path / "advice.png").is_file()
    [figure] = figures
    assert figure.get_suptitle() == "800 documents, 400 images, 0.909 patches per token"
    tokens, images, ratios, padding = figure.axes
    counted = [sum(bar.get_height() for bar in axes.patches) for axes in (tokens, images, ratios)]
    assert counted == [800, 400, 800]
    assert tokens.get_title() == "median 55, 95 % up to 63, largest 63"
    bars = [[bar.get_height() for bar in kind] for kind in padding.containers]
    assert bars == [[100 * (1 - o.tokens) for o in seen], [100 * (1 - o.patches) for o in seen]]


def test_the_script_prints_lines_for_the_toml(data, tmp_path):
    job = make_job(data, tmp_path)
    toml = tmp_path / "job.toml"
    sources = "".join(
        f'[[data.sources]]\nname = "{s.name}"\nformat = "{s.format}"\npath = "{s.path}"\n'
        for s in job.data.sources
    )
    toml.write_text(
        f"[training]\nseq_len = 256\n[data]\nmax_patches_per_image = 64\npacking_buffer_size = 16\n{sources}"
    )
    command = [
        sys.executable,
        "scripts/advise_packing.py",
        "--job.config_file",
        str(toml),
        "--samples",
        "300",
        "--buffers",
        "16",
        "64",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "patches_per_row = " in done.stdout and done.stdout.count("\n   ") >= 6


@pytest.mark.parametrize(
    ("command", "options", "named"),
    [
        ("advise", ["--buffers", "16", "0"], "--buffers 16 0"),
        ("advise", ["--samples", "0"], "--samples 0"),
        ("advise", ["--out", "nowhere/advice.png"], "--out = nowhere/advice.png"),
        ("inspect", ["--out", "nowhere/report.html"], "--out = nowhere/report.html"),
        ("inspect", ["--keys", "nowhere/keys.jsonl"], "--keys = nowhere/keys.jsonl"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_read(data, capsys, command, options, named):
    source = ["--training.dataset", "text", "--training.dataset_path", str(data / "texts")]
    assert main([command, *options, *source]) == 2
    assert f"error: {named}: " in capsys.readouterr().err
