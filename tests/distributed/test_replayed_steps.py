"""Whole steps of several ranks, collectives included, repeated without Python: as a CUDA graph would."""

import pytest

from tests.reference.tape import replay_on_rank

LAYOUTS = {
    "FSDP": {"training": {"global_batch_size": 8}},
    "FSDP, never resharding": {"parallelism": {"fsdp_reshard_after_forward": "never"}},
    "FSDP, tied": {"model": {"flavor": "tied"}},
    "HSDP, Muon": {"parallelism": {"data_parallel_replicate_degree": 2}, "optimizer": {"name": "Muon"}},
    "TP": {"parallelism": {"tensor_parallel_degree": 2}},
    "CP": {"parallelism": {"context_parallel_degree": 2}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replayed_steps_equal_driven_ones(pool, layout, tmp_path):
    pool.run(2, replay_on_rank, str(tmp_path), LAYOUTS[layout])
