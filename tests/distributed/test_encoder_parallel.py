"""Ranks that hold the same slots share the encoder: no image is encoded twice."""

import tempfile

import pytest
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from tests.reference.batches import Sizes
from tests.reference.small_run import CPU, SMALL, batch_of, job_of
from torchtitan.config.layout import degrees
from torchtitan.distributed.mesh import build_mesh
from torchtitan.loaded_model import give_weights, parallelize

SIZES = Sizes(seq_len=64, patches_per_row=96)


def encoder_flops(**parallelism) -> int:
    """Products of encoder and projector on this rank, forward, for four slots."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {f"parallelism.{key}": value for key, value in parallelism.items()} | {
            "training.local_batch_size": 4
        }
        job = job_of(changes, folder)
        mesh = build_mesh(degrees(job.parallelism, dist.get_world_size()), CPU)
        model = SMALL.build_model(job, SMALL.load_tokenizer(job))
        give_weights(parallelize(model, mesh, job, SMALL), model, job, mesh)
        # Slots with equal images, so that shares are equal: attention depends on what a row holds.
        tensors = SMALL.shard_batch(batch_of([0, 0, 0, 0], 1, SIZES).tensors, mesh, job)
        with FlopCounterMode(display=False) as counter:
            model.encode(tensors["pixel_values"], tensors["grid_thw"])
        return counter.get_total_flops()


def on_rank(options: dict) -> int:
    return encoder_flops(**options)


@pytest.mark.slow
def test_the_flops_of_the_encoder_fall_by_the_size_of_the_group(pool):
    group = {"context_parallel_degree": 2, "tensor_parallel_degree": 2}
    alone = pool.run(1, on_rank, {})[0]
    assert pool.run(4, on_rank, group | {"encoder_sharing": "on"}) == [alone // 4] * 4
    assert alone % 4 == 0
    assert pool.run(4, on_rank, group | {"encoder_sharing": "off"}) == [alone] * 4


@pytest.mark.slow
def test_with_sharded_heads_ranks_of_cp_still_share_rows(pool):
    group = {"context_parallel_degree": 2, "tensor_parallel_degree": 2, "encoder_tensor_parallel": True}
    heads_only, both = (
        pool.run(4, on_rank, group | {"encoder_sharing": sharing}) for sharing in ("off", "auto")
    )
    assert both == [flops // 2 for flops in heads_only]
    # The patch embedding and the projector are not split over heads.
    assert heads_only[0] < pool.run(1, on_rank, {})[0]
