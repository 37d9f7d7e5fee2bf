"""Two and four ranks train as one process does, and go on from each other's checkpoints."""

from pathlib import Path

import pytest
import torch

from tests.distributed import training
from tests.distributed.pool import Pool

TOLERANCE = 1e-5  # float32 sums in another order; seen: below 1e-6
STEPS = 4
BATCH = {"local_batch_size": 2, "global_batch_size": 8, "steps": STEPS}


def run(pool: Pool, ranks: int, folder: Path, **sections) -> dict:
    results = pool.run(ranks, training.train, str(folder), sections)
    for other in results[1:]:
        assert other["loss"] == results[0]["loss"] and other["norm"] == results[0]["norm"], "global figures are the same on every rank"
    return results[0]


@pytest.fixture(scope="module")
def one_process(pool, tmp_path_factory):
    return run(pool, 1, tmp_path_factory.mktemp("one"), training=BATCH | {"local_batch_size": 8})


def assert_same(a: dict, b: dict, tolerance: float = TOLERANCE) -> None:
    assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
    assert a["norm"] == pytest.approx(b["norm"], rel=tolerance)
    largest = max(float(gradient.abs().max()) for gradient in b["gradients"].values())
    assert a["gradients"].keys() == b["gradients"].keys()
    for name, gradient in b["gradients"].items():
        # A gradient that is truly zero (a key bias) is noise: measured against a thousandth of the largest.
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((a["gradients"][name] - gradient).abs().max()) < tolerance * scale, name


def test_accumulation_equals_one_large_forward(pool, one_process, tmp_path):
    assert_same(run(pool, 1, tmp_path, training=BATCH), one_process)


@pytest.mark.parametrize(
    "parallelism",
    [
        {},
        pytest.param({"fsdp_reshard_after_forward": "never"}, marks=pytest.mark.slow),
        pytest.param({"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}, marks=pytest.mark.slow),
    ],
    ids=["fsdp", "no-reshard", "replicated"],
)
def test_two_ranks_equal_one_process(pool, one_process, tmp_path, parallelism):
    assert_same(run(pool, 2, tmp_path, training=BATCH, parallelism=parallelism), one_process)


def test_hsdp_on_four_ranks_equals_one_process(pool, one_process, tmp_path):
    layout = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}
    assert_same(run(pool, 4, tmp_path, training=BATCH, parallelism=layout), one_process)


@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.slow), "selective"])
def test_activation_checkpointing_changes_nothing(pool, one_process, tmp_path, mode):
    recompute = {"mode": mode, "encoder_mode": mode}
    assert_same(run(pool, 2, tmp_path, training=BATCH, activation_checkpoint=recompute), one_process)


@pytest.mark.slow
def test_every_second_layer_checkpointed_changes_nothing(pool, one_process, tmp_path):
    recompute = {"mode": "selective", "selective_ac_option": "2"}
    assert_same(run(pool, 2, tmp_path, training=BATCH, activation_checkpoint=recompute), one_process)


@pytest.mark.slow
def test_cpu_offload_changes_nothing(pool, one_process, tmp_path):
    assert_same(run(pool, 2, tmp_path, training=BATCH | {"enable_cpu_offload": True}), one_process)


def test_tied_embeddings_and_a_frozen_encoder_on_two_ranks(pool, tmp_path):
    sections = {"model": {"flavor": "tied"}}
    frozen = BATCH | {"freeze": ["encoder"]}
    one = run(pool, 1, tmp_path / "1", training=frozen, **sections)
    two = run(pool, 2, tmp_path / "2", training=frozen, **sections)
    assert_same(two, one)
    assert not any(name.startswith("encoder") for name in one["gradients"])


def test_muon_on_two_ranks_takes_the_steps_of_one_process(pool, tmp_path):
    sections = {"optimizer": {"name": "Muon", "eps": 1e-6}, "training": BATCH}
    one, two = run(pool, 1, tmp_path / "1", **sections), run(pool, 2, tmp_path / "2", **sections)
    # The map to an orthogonal matrix enlarges differences of small singular values: losses after three steps agree to fewer digits.
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name, weight in one["weights"].items():
        assert torch.allclose(two["weights"][name], weight, atol=2e-3), name


def test_bfloat16_stays_near_float32(pool, one_process, tmp_path):
    low = run(pool, 2, tmp_path, training=BATCH | {"mixed_precision_param": "bfloat16"})
    # Eight bits of mantissa: 2^-8 = 0.4 % an operation, averaged over many.
    assert low["loss"] == pytest.approx(one_process["loss"], rel=2e-2)
    assert low["loss"] != one_process["loss"]


def test_norm_over_several_meshes_is_that_of_the_whole_gradients(pool, tmp_path):
    for ours, plain in pool.run(4, training.norm_of_mixed_gradients, str(tmp_path)):
        assert ours == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_a_run_goes_on_at_another_number_of_ranks(pool, one_process, tmp_path, before, after):
    saving = {"enable": True, "interval": 2}
    run(pool, before, tmp_path, training=BATCH | {"steps": 2}, lr_scheduler={"warmup_steps": 0, "decay_ratio": 1e-9}, checkpoint=saving)
    rest = run(pool, after, tmp_path, training=BATCH, lr_scheduler={"warmup_steps": 0, "decay_ratio": 1e-9}, checkpoint=saving)
    straight = run(pool, 1, tmp_path / "straight", training=BATCH, lr_scheduler={"warmup_steps": 0, "decay_ratio": 1e-9})
    assert rest["loss"] == pytest.approx(straight["loss"][2:], rel=TOLERANCE)
    assert rest["norm"] == pytest.approx(straight["norm"][2:], rel=TOLERANCE)


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_a_checkpoint_holds_the_state_at_the_time_of_saving(pool, tmp_path, async_mode):
    assert pool.run(2, training.save_then_spoil, str(tmp_path), async_mode) == [True, True]


def test_a_checkpoint_right_after_a_validation_holds_the_same_as_before_it(pool, tmp_path):
    assert pool.run(2, training.validate_then_save, str(tmp_path)) == [True, True]


def test_a_write_that_breaks_off_leaves_no_checkpoint(pool, tmp_path):
    assert pool.run(1, training.fail_while_writing, str(tmp_path)) == [[]]


def test_a_rank_that_hangs_is_named_with_its_step(pool, tmp_path):
    assert pool.run(2, training.wait_for_a_stuck_rank, str(tmp_path))[0] == "behind the others: rank 1 in step 2"


def test_ranks_that_only_waited_are_not_blamed(pool):
    told = pool.run(4, training.who_is_blamed)
    assert told[0] == told[1] == "rank 2 failed by itself in step 5, rank 3 does not answer since it began step 5"
    assert told[2] == "all ranks had begun step 5"


def test_ranks_with_other_options_are_told_before_they_wait_for_each_other(pool, tmp_path):
    first, second = pool.run(2, training.start_with_another_learning_rate, str(tmp_path))
    assert second.startswith("rank 1 has other options than rank 0: optimizer.lr, lr_scheduler.warmup_steps;")
    assert first.startswith("rank 0 sees ranks with other options")


def test_muons_work_shared_over_ranks_is_the_whole_work(pool):
    # Batched and single products sum in another order.
    assert max(pool.run(3, training.muon_apart_and_together)) < 1e-5
