"""A slot whose tokens lie on several ranks gives what it gives on one."""

import dataclasses
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.reference.attention import allowed_pairs, dense_attention
from tests.reference.batches import Sizes
from tests.reference.small_run import CPU, SMALL, batch_of, job_of
from torchtitan.config.layout import degrees
from torchtitan.distributed.context_parallel import METHODS, in_slot_order, rows_of_ranks
from torchtitan.distributed.differentiable import gather
from torchtitan.distributed.mesh import build_mesh
from torchtitan.layers.attention import prepare_mask
from torchtitan.layers.masks import Mask
from torchtitan.loaded_model import give_weights, parallelize

SIZES = Sizes(seq_len=64, patches_per_row=96)


def logits(cp: int, tp: int, method: str) -> Tensor:
    """Logits of two slots, whole and in order, on every rank."""
    with tempfile.TemporaryDirectory() as folder:
        degree = {
            "context_parallel_degree": cp,
            "tensor_parallel_degree": tp,
            "context_parallel_method": method,
        }
        job = job_of(
            {f"parallelism.{key}": value for key, value in degree.items()} | {"training.local_batch_size": 2},
            folder,
        )
        mesh = build_mesh(degrees(job.parallelism, dist.get_world_size()), CPU)
        model = SMALL.build_model(job, SMALL.load_tokenizer(job))
        give_weights(parallelize(model, mesh, job, SMALL), model, job, mesh)
        tensors = SMALL.shard_batch(batch_of([0, 1], 1, SIZES).tensors, mesh, job)
        del tensors["labels"]
        with torch.no_grad():
            found = model(**tensors)
        if cp > 1:
            found = gather(found, 1, mesh["cp"].get_group())
        return in_slot_order(found, tensors["kv_rows"]) if "kv_rows" in tensors else found


@pytest.fixture(scope="module")
def of_one_process(pool):
    return pool.run(1, logits, 1, 1, "allgather")[0]


@pytest.mark.parametrize(
    ("cp", "tp", "method"),
    [
        pytest.param(2, 1, "allgather", marks=pytest.mark.slow),
        pytest.param(4, 1, "allgather", marks=pytest.mark.slow),
        (4, 1, "ulysses"),
        (2, 2, "allgather"),
    ],
)
def test_ranks_that_share_slots_give_the_logits_of_one(pool, of_one_process, cp, tp, method):
    for found in pool.run(cp * tp, logits, cp, tp, method):
        assert found.shape == of_one_process.shape
        # Sums in another order, through six layers; logits are of order 1.
        assert torch.allclose(found, of_one_process, atol=1e-5, rtol=0)


@dataclasses.dataclass
class Slots:
    """Two slots: one document that lies on every rank; several, of which some are cut, and padding."""

    segments: Tensor
    inputs: list[Tensor]  # q, k, v and the weights of a sum over the output

    @classmethod
    def draw(cls) -> "Slots":
        cut = [0] * 50 + [1] * 3 + [2] * 51 + [-1] * 24
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, 128, heads, 8) for heads in (4, 4, 4, 4)]
        shapes[1] = shapes[2] = (2, 128, 2, 8)
        return cls(
            torch.tensor([[0] * 128, cut], dtype=torch.int32),
            [torch.randn(shape, generator=generator) for shape in shapes],
        )


def attend(method: str, balance: bool) -> list[Tensor]:
    """Output and gradients of q, k, v, whole and in order."""
    slots, group = Slots.draw(), dist.group.WORLD
    ranks, rank = dist.get_world_size(), dist.get_rank()
    rows_BRQ = rows_of_ranks(slots.segments, ranks, balance)
    mine, every = rows_BRQ[:, rank], rows_BRQ.flatten(1)
    q, k, v, weights = (
        torch.stack([slot[rows] for slot, rows in zip(x, mine, strict=True)]).requires_grad_()
        for x in slots.inputs
    )
    if method == "ulysses":
        mask = Mask(slots.segments.gather(1, every), True, rows=every.int())
    else:
        mask = Mask(
            slots.segments.gather(1, mine), True, slots.segments.gather(1, every), mine.int(), every.int()
        )
    out = METHODS[method]("sdpa", group)(q, k, v, prepare_mask(mask, "sdpa"))
    found = [out.detach(), *torch.autograd.grad((out * weights.detach()).sum(), (q, k, v))]
    return [in_slot_order(gather(x, 1, group), every) for x in found]


@pytest.mark.parametrize(
    ("method", "balance"), [("allgather", True), ("allgather", False), ("ulysses", False), ("ulysses", True)]
)
def test_attention_of_a_document_on_two_ranks_is_exact(pool, method, balance):
    slots = Slots.draw()
    q, k, v, weights = slots.inputs
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    out = dense_attention(*tensors, allowed_pairs(Mask(slots.segments, causal=True)))
    expected = [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]
    for found in pool.run(2, attend, method, balance):
        for ours, reference in zip(found, expected, strict=True):
            assert torch.allclose(ours, reference, atol=3e-6, rtol=0)
