"""How often each source was delivered, against a count of its samples; and the line when it begins anew."""

import logging
from collections import Counter

import pytest

from experiments.vlm.data.loader import Loader, Step
from experiments.vlm.spec import counts
from tests.tiny_data import Characters, make_job, write_all
from torchtitan.components.epochs import Epochs

SIZES = {"captions": 60, "documents": 30, "texts": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def loaders(data, dump, ranks: int, **options) -> list[Loader]:
    """Loaders of all ranks."""
    job = make_job(data, dump, global_batch_size=4, local_batch_size=1, **options)
    return [Loader(job, Characters(), rank=rank, ranks=ranks) for rank in range(ranks)]


def added(steps: list[Step]) -> dict[str, float]:
    total: Counter = Counter()
    for step in steps:
        for batch in step.batches:
            total.update(batch.epochs)
    return dict(total)


@pytest.mark.parametrize("ranks", [1, 2])
def test_epochs_are_the_samples_delivered_over_those_of_the_source(data, tmp_path, ranks):
    running = loaders(data, tmp_path, ranks)
    seen: Counter = Counter()
    for _ in range(40):
        steps = [next(loader) for loader in running]
        for step in steps:
            for batch in step.batches:
                seen.update({name: batch.counts[f"samples/{name}"] for name in SIZES})
        epochs = added(steps)
        # Units of captions are of one size, so each sample weighs the same. Of the others some come in
        # pieces, and the last of them counts.
        assert epochs["captions"] == pytest.approx(seen["captions"] / SIZES["captions"], abs=1e-9)
        assert 0 <= epochs["texts"] <= seen["texts"] / SIZES["texts"] + 1e-9
    assert min(epochs.values()) > 1
    reports = [loader.report()["sources"] for loader in running]
    for name in SIZES:
        assert sum(report[name]["epochs"] for report in reports) == pytest.approx(epochs[name])
    for loader in running:
        loader.close()


def test_data_that_ended_was_delivered_a_whole_number_of_times(data, tmp_path):
    (loader,) = loaders(data, tmp_path, 1, epochs=2)
    *_, last = loader
    loader.close()
    assert added([last]) == pytest.approx(dict.fromkeys(SIZES, 2.0), abs=1e-9)


def test_a_resumed_run_goes_on_counting(data, tmp_path):
    (straight,), (resumed,) = loaders(data, tmp_path, 1), loaders(data, tmp_path, 1)
    for _ in range(15):
        state = next(straight).state()
    resumed.load_state_dict(state)
    assert resumed.report() == straight.report()
    assert added([next(resumed)]) == added([next(straight)])
    straight.close(), resumed.close()


def lines(epochs: Epochs, values: list[float], log_every: int, caplog) -> list[str]:
    with caplog.at_level(logging.INFO, logger="torchtitan"):
        for step, value in enumerate(values, 1):
            epochs.add(step, {"epochs/a": value, "epochs/b": 0.5})
            if step % log_every == 0:
                epochs.log()
    return caplog.messages


def test_a_source_that_begins_anew_is_told_with_the_step(caplog):
    told = lines(
        Epochs(("a", "b"), resumed=False, passes={}), [0.6, 1.0 + 1e-9, 1.1, 1.9, 2.0, 2.3], 1, caplog
    )
    assert told == ["source a: epoch 2 began in step 3", "source a: epoch 3 began in step 6"]


def test_a_small_source_is_told_once_a_line_of_training(caplog):
    told = lines(
        Epochs(("a", "b"), resumed=False, passes={}), [0.8 * step for step in range(1, 11)], 5, caplog
    )
    assert told == ["source a: epoch 4 began in step 4", "source a: epoch 8 began in step 9"]


def test_a_resumed_run_tells_nothing_of_what_began_before(caplog):
    epochs = Epochs(("a", "b"), resumed=True, passes={})
    assert lines(epochs, [3.5, 3.9, 4.2], 1, caplog) == ["source a: epoch 5 began in step 3"]
    assert epochs.metrics() == {"epochs/a": 4.2, "epochs/b": 0.5}


def test_a_source_that_ends_is_told_once_and_not_again_after_a_resume(caplog):
    told = lines(Epochs(("a", "b"), False, {"a": 2}), [0.9, 2.0 - 1e-9, 2.0, 2.0], 2, caplog)
    assert told == ["source a: epoch 2 began in step 2", "source a: epoch 2, its last, ended in step 2"]
    caplog.clear()
    assert lines(Epochs(("a", "b"), True, {"a": 2}), [2.0, 2.0], 1, caplog) == []


def test_what_ends_is_what_does_not_repeat_or_all_after_data_epochs(data, tmp_path):
    job = make_job(data, tmp_path)
    job.data.sources[1].repeat = False
    assert counts(job).passes == {job.data.sources[1].name: 1}
    job.data.epochs = 3
    assert set(counts(job).passes.values()) == {1, 3}
