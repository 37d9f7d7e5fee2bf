"""Recomputation for a memory budget, against every choice there is, estimated one by one; and in a run."""

import itertools
from pathlib import Path

import pytest

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.costs import estimate as estimating
from experiments.vlm.costs.estimate import estimate
from experiments.vlm.costs.recomputation import with_options
from tests.reference.small_run import CPU, SMALL, VOCAB, job_of
from torchtitan.build import build
from torchtitan.config.check import zero_bubble_works
from torchtitan.config.errors import ConfigError
from torchtitan.config.layout import Degrees
from torchtitan.config.parse import read_toml
from torchtitan.distributed.process_group import close_process_group, open_process_group
from torchtitan.tools.hardware import GIB
from torchtitan.train import Trainer

ONE = Degrees(1, 1, 1, 1, 1)
# full_layers and selective_layers of two encoder layers and of the decoder's, least recomputation first
ENCODER = [(0, 0), (0, 1), (0, 2), (1, 1), (2, 0)]
DECODER = [(0, number) for number in range(5)] + [(number, 4 - number) for number in range(1, 5)]


def job(**parallelism) -> VLMJobConfig:
    found = job_of({"training.seq_len": 256, "data.patches_per_row": 256}, "")
    for name, value in parallelism.items():
        setattr(found.parallelism, name, value)
    return found


def peak(changed: VLMJobConfig, sizes: Degrees = ONE) -> float:
    return estimate(changed, sizes, VOCAB).memory.total


def chosen(gib: float, sizes: Degrees = ONE, **parallelism) -> VLMJobConfig:
    asked = job(**parallelism)
    asked.activation_checkpoint.memory_budget_gib = gib
    return estimate(asked, sizes, VOCAB).job


@pytest.fixture(scope="module")
def peaks() -> dict[tuple, float]:
    """Peaks of every choice, each with a share of its own."""
    return {pair: peak(with_options(job(), *pair)) for pair in itertools.product(ENCODER, DECODER)}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_no_less_recomputation_stays_within_the_budget(share, peaks):
    least, most = min(peaks.values()), max(peaks.values())
    budget = least + share * (most - least)
    ac = chosen(budget / GIB).activation_checkpoint
    pair = (ac.encoder[2:], ac.decoder[2:])
    assert peaks[pair] <= budget
    less = [
        (encoder, decoder)
        for encoder, decoder in peaks
        if ENCODER.index(encoder) <= ENCODER.index(pair[0])
        and DECODER.index(decoder) <= DECODER.index(pair[1])
    ]
    assert [other for other in less if peaks[other] <= budget] == [pair]


@pytest.mark.parametrize(
    ("sizes", "parallelism"),
    [
        (Degrees(1, 2, 1, 2, 1), {}),
        (Degrees(1, 1, 1, 1, 2), {"pipeline_parallel_schedule": "1F1B"}),
        *([(Degrees(1, 1, 1, 1, 2), {"pipeline_parallel_schedule": "ZBVZeroBubble"})] * zero_bubble_works()),
    ],
)
def test_other_layouts_stay_within_it_too(sizes, parallelism):
    most, least = (
        peak(with_options(job(**parallelism), *pair), sizes) for pair in (((0, 0), (0, 0)), ((2, 0), (4, 0)))
    )
    found = chosen((most + least) / 2 / GIB, sizes, **parallelism)
    assert peak(found, sizes) <= (most + least) / 2
    zero_bubble = parallelism.get("pipeline_parallel_schedule") == "ZBVZeroBubble"
    assert not zero_bubble or found.activation_checkpoint.decoder.selective_layers == 0


def test_a_budget_that_holds_not_even_full_recomputation_is_refused():
    with pytest.raises(ConfigError, match=r"memory_budget_gib = 0.001: with every layer recomputed the peak"):
        chosen(0.001)


def losses(folder: Path, **activation_checkpoint) -> list[float]:
    run = job_of({"training.steps": 3}, str(folder))
    for name, value in activation_checkpoint.items():
        setattr(run.activation_checkpoint, name, value)
    open_process_group(run.comm, folder)
    trainer = Trainer(build(run, SMALL, CPU))
    try:
        found = []
        while trainer.train_step():
            found.append(trainer.loss.item())
            if len(found) == 3:
                return found
        raise AssertionError("the data ended")
    finally:
        trainer.close()
        close_process_group()


def test_a_run_within_a_budget_loses_what_one_without_loses_and_keeps_what_was_chosen(tmp_path):
    small = job_of({}, "")
    most, least = (peak(with_options(small, *pair)) for pair in (((0, 0), (0, 0)), ((2, 0), (4, 0))))
    budget = (most + least) / 2 / GIB
    assert losses(tmp_path / "within", memory_budget_gib=budget) == losses(tmp_path / "free")
    kept = read_toml(str(tmp_path / "within" / "config.toml"))["activation_checkpoint"]
    assert kept["memory_budget_gib"] == budget
    assert sum(value for name, value in kept.items() if name.endswith("layers")) > 0


def test_what_was_chosen_is_not_sought_again_for_its_peak(monkeypatch):
    asked = job()
    most, least = (peak(with_options(job(), *pair)) for pair in (((0, 0), (0, 0)), ((2, 0), (4, 0))))
    asked.activation_checkpoint.memory_budget_gib = (most + least) / 2 / GIB
    SMALL.fit_memory(asked, ONE, None)
    monkeypatch.setattr(estimating, "within_budget", lambda *_: pytest.fail("it is sought again"))
    assert least < SMALL.memory(asked, ONE, None, True).total <= (most + least) / 2
    assert asked.activation_checkpoint.memory_budget_gib > 0


def test_a_budget_that_holds_everything_needs_no_search(monkeypatch):
    monkeypatch.setattr(estimating, "within_budget", lambda *_: pytest.fail("there is nothing to seek"))
    ac = chosen(1.0).activation_checkpoint
    assert (ac.encoder.until, ac.decoder.until) == (0, 0)
