"""What a batch counts, and how the held-out split is spoilt, is said in one place each: what a further row of
either needs.
"""

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest

import torchtitan
from experiments.vlm.data.batch_metrics import BATCH_METRICS, BatchMetric
from experiments.vlm.data.controls import CONTROLS, Painted
from experiments.vlm.data.document import Image
from experiments.vlm.data.loader import Loader
from experiments.vlm.spec import SPEC
from tests.tiny_data import Characters, make_job, write_all


@pytest.fixture
def job(tmp_path):
    job = make_job(write_all(tmp_path), tmp_path)
    job.validation.sources = job.data.sources
    return job


def first_batch(job, **options):
    loader = Loader(job, Characters(), **options)
    try:
        return next(loader).batches[0]
    finally:
        loader.close()


def test_a_further_metric_is_counted_and_shown_from_its_row_alone(job, monkeypatch):
    documents = BatchMetric(lambda views, samples: len(samples), capacity=lambda job: 7, per_second=True)
    longest = BatchMetric(lambda views, samples: int(views["positions"].max()), written=True)
    monkeypatch.setitem(BATCH_METRICS, "documents", documents)
    monkeypatch.setitem(BATCH_METRICS, "longest", longest)
    batch, counts = first_batch(job), SPEC.counts(job)
    assert batch.counts["documents"] == len(batch.samples) > 0
    assert counts.capacity["documents"] == 7 and "documents" in counts.rates
    assert "longest" in counts.tallies and {"documents", "longest"} <= set(counts.names)


def test_every_number_of_a_batch_is_summed_over_ranks(job):
    assert set(first_batch(job).counts) <= set(SPEC.counts(job).names)


def test_a_further_control_is_a_row_that_paints_as_it_likes(job, monkeypatch):
    def darkened(document, shard, record):
        painted = Painted(lambda height, width: np.full((height, width, 3), 7, np.uint8))
        parts = [
            dataclasses.replace(part, locator=painted) if isinstance(part, Image) else part
            for part in document.parts
        ]
        return dataclasses.replace(document, parts=parts)

    monkeypatch.setitem(CONTROLS, "darkened", darkened)
    pixels = first_batch(job, split="validation", control="darkened").tensors["pixel_values"].unique()
    assert set(pixels.tolist()) <= {0, 7} and 7 in pixels
    assert tuple(SPEC.scoring.controls) == ("blanked", "shuffled")


def test_the_trainer_names_no_control_and_no_count_of_the_experiment():
    names = {*CONTROLS, "images", "patches", "loss_tokens", "pixel_values"}
    for file in (
        "train",
        "build",
        "dry_run",
        "spec",
        "components/metrics",
        "components/validation",
        "components/curves",
    ):
        tree = ast.parse((Path(torchtitan.__file__).parent / f"{file}.py").read_text())
        used = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not names & used, file
