"""How layers lie on the stages of a pipeline."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.costs.rank_share import build_on_meta
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.parallelism.stages import split_layers
from torchtitan.config.layout import Degrees
from torchtitan.distributed.pipeline_parallel import Pipeline
from torchtitan.distributed.stages import Split, rank_of_stage, split_evenly, stages_of_rank


def dearest(cuts, costs, first, last) -> float:
    edges = [0, *cuts, len(costs)]
    stages = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
    stages[0] += first
    stages[-1] += last
    return max(stages)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (2.5, 1), (0.4, 3.2), (9, 0)])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_other_split_has_a_cheaper_dearest_stage(stages, first, last):
    costs = [1.0, 1.0, 2.0, 1.0, 0.5, 1.0, 1.0]
    ours = split_evenly(costs, first, last, stages)
    every = itertools.combinations_with_replacement(range(len(costs) + 1), stages - 1)
    assert dearest(ours, costs, first, last) == pytest.approx(
        min(dearest(cuts, costs, first, last) for cuts in every)
    )
    assert all(a < b for a, b in itertools.pairwise(ours)), "stages between the ends have layers"


def test_equal_layers_are_dealt_evenly():
    assert split_evenly([1.0] * 8, 0, 0, 4) == [2, 4, 6]


def test_an_encoder_stage_holds_no_layer():
    assert split_evenly([1.0] * 6, 5, 0, 4, empty_first=True) == [0, 2, 4]


def test_stages_lie_round_the_ranks_or_in_a_v():
    assert [stages_of_rank("1F1B", rank, 3, 3) for rank in range(3)] == [[0], [1], [2]]
    assert [stages_of_rank("Interleaved1F1B", rank, 2, 6) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert [stages_of_rank("ZBVZeroBubble", rank, 3, 6) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert [rank_of_stage("ZBVZeroBubble", stage, 2, 4) for stage in range(4)] == [0, 1, 1, 0]


def test_a_split_names_the_layers_of_each_stage():
    split = Split(5, (0, 2, 5))
    assert [list(split.of(stage)) for stage in range(split.stages)] == [[], [0, 1], [2, 3, 4], []]


def layers_of_stages(
    patches_per_row: int, checkpointing: dict[str, str] | None = None, freeze=(), **parallelism
) -> list[int]:
    job = VLMJobConfig()
    job.data.patches_per_row = patches_per_row
    for name, value in (checkpointing or {}).items():
        setattr(job.activation_checkpoint, name, value)
    for name, value in parallelism.items():
        setattr(job.parallelism, "pipeline_parallel_" + name, value)
    job.training.freeze = list(freeze)
    model = build_on_meta(job, FLAVORS["so400m-llama3.1-8B"], 128256)
    split = split_layers(model, job, Degrees(1, 1, 1, 1, 4))
    return [len(split.of(stage)) for stage in range(split.stages)]


def test_more_patches_leave_the_first_stage_fewer_layers():
    few, many = layers_of_stages(512), layers_of_stages(8192)
    assert sum(few) == sum(many) == 32 and many[0] < few[0]


def test_a_frozen_encoder_leaves_the_first_stage_more_layers():
    frozen = layers_of_stages(8192, {"encoder_mode": "full"}, freeze=["encoder"])
    assert frozen[0] > layers_of_stages(8192)[0]
    assert frozen == layers_of_stages(8192, freeze=["encoder"]), "nothing is computed again"


def test_what_backward_computes_again_has_its_cost():
    plain = layers_of_stages(8192)
    encoder = {"encoder_mode": "full"}
    every_second = {"encoder_mode": "selective", "selective_ac_option": "2"}
    decoder = {"mode": "full"}
    fewest, fewer, more = (layers_of_stages(8192, mode)[0] for mode in (encoder, every_second, decoder))
    assert fewest < fewer < plain[0] < more
    assert layers_of_stages(8192, {"encoder_mode": "selective"}) == plain, "products are kept"


def test_layers_are_split_by_hand_where_asked():
    assert layers_of_stages(512, split_points=[2, 12, 22]) == [2, 10, 10, 10]


def test_the_encoder_may_be_a_stage_of_its_own():
    layers = layers_of_stages(512, encoder_stage=True)
    assert layers[0] == 0 and sum(layers) == 32


def test_rows_that_do_not_divide_among_microbatches_are_told():
    """Dealt by torch.tensor_split, 6 rows for 4 microbatches would be 2, 2, 1 and 1 without a word."""
    pipeline = SimpleNamespace(_microbatches=4)
    Pipeline._check(pipeline, {"tokens": torch.zeros(8, 3)})
    with pytest.raises(AssertionError, match="pixel_values"):
        Pipeline._check(pipeline, {"tokens": torch.zeros(8, 3), "pixel_values": torch.zeros(6, 2)})
