"""What the roofline counts of a step, against closed forms."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.roofline import (
    ATTENTION,
    ELEMENTWISE,
    PRODUCTS,
    Recorder,
    Row,
    draw,
    kernels_of_forward,
    rows_of,
)
from experiments.vlm.costs.flops import Work, flops_of_work
from experiments.vlm.costs.rank_share import build_on_meta
from experiments.vlm.model_config import model_config
from tests.reference.small_run import job_of


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_what_lies_between_two_products_reads_and_writes_what_others_made_and_read():
    x, a, b = meta(6, 8), meta(8, 16), meta(8, 4)
    recorder = Recorder({})
    with recorder:
        left, right = (x @ a).chunk(2, 1)
        y = (F.silu(left) * right + 1.0) @ b
        del y
    first, between, last = recorder.found()
    assert (first.kind, between.kind, last.kind) == (PRODUCTS, ELEMENTWISE, PRODUCTS)
    assert [first.flops, last.flops] == [2 * 6 * 8 * 16, 2 * 6 * 8 * 4]
    # Both halves lie in one storage. Neither silu nor the product nor the sum but the last is ever stored.
    assert (sum(between.reads.values()), sum(between.writes.values())) == (6 * 16 * 4, 6 * 8 * 4)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_products_and_attention_of_a_step_are_those_of_the_formula(tmp_path: Path, mode: str):
    """All rows are full, and what is computed again in backward is one more pass forward."""
    slots = 2
    changes = {"training.local_batch_size": slots, "training.global_batch_size": slots}
    ac = {f"activation_checkpoint.{name}": mode for name in ("mode", "encoder_mode")}
    job = job_of(changes | ac, str(tmp_path))
    model = build_on_meta(job, model_config(job), 512)
    rows = slots * job.data.patch_rows * job.data.patches_per_row, slots * job.training.seq_len
    work = Work(*rows, image_pairs=3000, causal_pairs=5000)
    flops = flops_of_work(model)
    kernels = kernels_of_forward(job, model, work)
    found = {row.kind: row for row in rows_of(kernels, 1e12, 1e12, 1)}
    attention = flops(Work(0, 0, 3000, 5000)) / 3  # a pass
    passes = 1 + (mode == "full") + 2.5
    assert found[ATTENTION].flops == pytest.approx(passes * attention)
    table = model.get_parameter("encoder.embedding.positions.weight")
    positions = 2 * 2 * rows[0] * table.numel()  # interpolated by a product: not useful work
    products = flops(Work(*rows, 0, 0)) + positions
    assert found[PRODUCTS].flops == pytest.approx(products, rel=1e-6) or mode == "full"
    assert mode == "none" or products < found[PRODUCTS].flops < products * 4 / 3


def test_a_kind_takes_as_long_as_its_flops_or_its_bytes_kernel_by_kernel(tmp_path: Path):
    recorder = Recorder({})
    with recorder:
        meta(100, 100) @ meta(100, 100)
        meta(1, 1000) @ meta(1000, 1)
    kernels = recorder.found()
    (row,) = rows_of(kernels, peak=1e6, bandwidth=1e6, times=3)
    assert row.kernels == 6
    assert row.seconds == pytest.approx(3 * (2 * 100**3 / 1e6 + 4 * 2001 / 1e6))
    draw([row, Row(ELEMENTWISE, 1, 0, 8, 1)], {PRODUCTS: 9.0}, 1e6, 1e6, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10_000
