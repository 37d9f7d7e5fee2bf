"""What an update needs of several ranks: the norm of all gradients, and Muon's work shared out."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.reference.small_run import CPU, SMALL, job_of
from torchtitan.build import build
from torchtitan.components import muon
from torchtitan.distributed import grad_norm


def norm_of_mixed_gradients(folder: str) -> tuple[float, float]:
    """Ours, and the norm of the gradients gathered whole."""
    run = build(job_of({}, folder), SMALL, CPU)
    torch.manual_seed(0)
    total = 0.0
    for parameter in run.state.optimizers.parameters:
        full = torch.randn(parameter.shape)
        total += float(full.double().square().sum())
        assert isinstance(parameter, DTensor)
        parameter.grad = DTensor.from_local(full, parameter.device_mesh).redistribute(
            placements=parameter.placements
        )
    return float(grad_norm.global_norm(run.state.optimizers.parameters, run.mesh)), total**0.5


def test_norm_over_several_meshes_is_that_of_the_whole_gradients(pool, tmp_path):
    for ours, plain in pool.run(4, norm_of_mixed_gradients, str(tmp_path)):
        assert ours == pytest.approx(plain, rel=1e-6)


def muon_apart_and_together() -> float:
    """Largest difference between sharing the work and doing all of it; some rows do not divide evenly."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    worst = 0.0
    for rows, columns, matrices in ((8, 6, 3), (7, 12, 2), (5, 5, 1), (1, 9, 2)):
        generator = torch.Generator().manual_seed(rows)
        whole = torch.randn(matrices, rows, columns, generator=generator)
        updates = [distribute_tensor(matrix, mesh, [Shard(0)], src_data_rank=None) for matrix in whole]
        group = muon._row_group(updates[0])
        assert group is not None
        apart = muon.directions_apart(updates, group, torch.float32)
        together = muon.directions_together(updates, torch.float32)
        for a, b in zip(apart, together, strict=True):
            assert a.shape == b.shape
            worst = max(worst, float((a - b).abs().max()) if a.numel() else 0.0)
    return worst


def test_muons_work_shared_over_ranks_is_the_whole_work(pool):
    # Batched and single products sum in another order.
    assert max(pool.run(3, muon_apart_and_together)) < 1e-5
