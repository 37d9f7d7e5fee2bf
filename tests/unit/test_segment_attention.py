"""The segment operator against dense attention in float64, and as an operator: compiled, checkpointed,
counted.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.reference.attention import allowed_pairs, dense_attention
from torchtitan.layers.attention import InnerAttention, prepare_mask
from torchtitan.layers.masks import Mask
from torchtitan.layers.segment_attention import segment_attention

# Equal and unequal lengths, a segment of one, padding inside the row and at its end, a row of nothing else.
SEGMENTS = torch.tensor(
    [
        [0] * 7 + [1] * 7 + [2] + [-1] * 3 + [3] * 12 + [-1] * 10,
        [4] * 40,
        [-1] * 40,
    ],
    dtype=torch.int32,
)
ROWS = torch.arange(40, dtype=torch.int32).expand(3, -1)
ORDER = torch.randperm(40, generator=torch.Generator().manual_seed(0))
# as context parallel deals them
BLOCKS = torch.cat([torch.arange(start, start + 5) for start in (30, 0, 15, 10)])

MASKS = {
    "images": Mask(SEGMENTS, causal=False),
    "documents": Mask(SEGMENTS, causal=True),
    "permuted": Mask(SEGMENTS[:, ORDER], causal=True, rows=ROWS[:, ORDER], kv_rows=ROWS[:, ORDER]),
    "blocks of the queries": Mask(
        SEGMENTS[:, BLOCKS], True, SEGMENTS[:, ORDER], ROWS[:, BLOCKS], ROWS[:, ORDER]
    ),
    "some keys for other queries": Mask(SEGMENTS[:, :25], causal=False, kv_segments=SEGMENTS[:, ORDER]),
}


def inputs(mask: Mask, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    Q, K = mask.segments.shape[1], mask.keys().shape[1]
    return [
        torch.randn(3, n, h, 16, generator=generator).to(dtype).requires_grad_()
        for n, h in ((Q, heads), (K, kv_heads), (K, kv_heads))
    ]


def arguments(mask: Mask) -> tuple:
    return (
        mask.segments,
        mask.keys(),
        mask.query_rows().contiguous(),
        mask.key_rows().contiguous(),
        mask.causal,
    )


def result_and_gradients(attend, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    out = attend(*tensors)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("name", MASKS)
def test_result_and_gradients_equal_dense_attention(name, heads):
    mask = MASKS[name]
    tensors = inputs(mask, *heads)
    ours = result_and_gradients(lambda q, k, v: segment_attention(q, k, v, *arguments(mask))[0], tensors)
    expected = result_and_gradients(lambda q, k, v: dense_attention(q, k, v, allowed_pairs(mask)), tensors)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("name", MASKS)
def test_bfloat16_stays_within_its_rounding(name):
    mask = MASKS[name]
    tensors = inputs(mask, 4, 2, torch.bfloat16)
    ours = result_and_gradients(lambda q, k, v: segment_attention(q, k, v, *arguments(mask))[0], tensors)
    expected = result_and_gradients(lambda q, k, v: dense_attention(q, k, v, allowed_pairs(mask)), tensors)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits, and a gradient is a sum of rounded terms.
        assert (a - b).abs().max() < 0.03 * b.abs().max()


def test_padding_gives_zeros_and_is_never_read():
    mask = MASKS["documents"]
    q, k, v = inputs(mask, 4, 2)
    with torch.no_grad():
        for x in (q, k, v):
            x[SEGMENTS < 0] = float("nan")
    out, *gradients = result_and_gradients(lambda *x: segment_attention(*x, *arguments(mask))[0], [q, k, v])
    assert not out[SEGMENTS < 0].any() and out.isfinite().all()
    for gradient in gradients:
        assert not gradient[SEGMENTS < 0].any() and gradient.isfinite().all()


@pytest.mark.parametrize("name", ["images", "documents", "blocks of the queries"])
def test_the_operator_keeps_the_rules_of_operators(name):
    torch.library.opcheck(segment_attention, (*inputs(MASKS[name], 4, 2), *arguments(MASKS[name])))


def test_strided_inputs_are_read_as_they_are():
    mask = MASKS["documents"]
    tensors = inputs(mask, 4, 4)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors]
    results = [
        result_and_gradients(lambda *x: segment_attention(*x, *arguments(mask))[0], x)
        for x in (tensors, strided)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_changes_nothing():
    prepared, tensors = prepare_mask(MASKS["documents"], "sdpa"), inputs(MASKS["documents"], 4, 2)
    inner = InnerAttention("sdpa")
    plain = result_and_gradients(lambda *x: inner(*x, prepared), tensors)
    recomputed = result_and_gradients(
        lambda *x: checkpoint(inner, *x, prepared, use_reentrant=False), tensors
    )
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


def test_compiled_whole_and_never_again_for_other_documents():
    torch._dynamo.reset()
    inner, counter = InnerAttention("sdpa"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(inner, fullgraph=True, backend=counter, dynamic=False)
    tensors = inputs(MASKS["documents"], 4, 2)
    for shift in range(4):
        prepared = prepare_mask(Mask(SEGMENTS.roll(shift * 3, 1), causal=True), "sdpa")
        eager = result_and_gradients(lambda *x, p=prepared: inner(*x, p), tensors)
        traced = result_and_gradients(lambda *x, p=prepared: compiled(*x, p), tensors)
        for a, b in zip(eager, traced, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_flops_count_the_pairs_that_are_computed():
    mask, tensors = MASKS["images"], inputs(MASKS["images"], 4, 2)
    counter = FlopCounterMode(display=False)
    with counter:
        segment_attention(*tensors, *arguments(mask))[0].sum().backward()
    pairs = int(allowed_pairs(mask).sum())
    forward = 4 * pairs * 4 * 16  # two products of 16 multiply-adds, two operations each, for every head
    assert counter.get_total_flops() == forward + forward * 5 // 2
