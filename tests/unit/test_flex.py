"""FlexAttention's block mask against every pair, and its result against SDPA's.

Forward only: there is no backward on CPU.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask

from tests.reference.attention import allowed_pairs, dense_attention, packed
from torchtitan.layers.attention import InnerAttention, prepare_mask
from torchtitan.layers.flex import BLOCK, block_mask
from torchtitan.layers.masks import Mask


@st.composite
def masks(draw) -> Mask:
    """Packed rows of any length: sorted or permuted, with padding anywhere, square or rectangular."""
    batch, causal = draw(st.integers(1, 2)), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def side(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        longest = draw(st.sampled_from([3, 40, 200, 600]))
        segments = torch.empty(batch, length, dtype=torch.int32)
        for b in range(batch):
            lengths = torch.randint(1, longest + 1, (length,), generator=generator)
            names = torch.arange(length)
            # Some segments are padding, so that it stands inside a row too.
            names[torch.rand(length, generator=generator) < 0.15] = -1
            segments[b] = names.repeat_interleave(lengths)[:length]
        rows = torch.arange(length, dtype=torch.int32).expand(batch, -1)
        if draw(st.booleans()):
            order = torch.randperm(length, generator=generator)
            segments, rows = segments[:, order], rows[:, order]
        return segments, rows

    q_seg, q_rows = side(draw(st.integers(1, 500)))
    if draw(st.booleans()):
        return Mask(q_seg, causal, rows=q_rows, kv_rows=q_rows)
    k_seg, k_rows = side(draw(st.integers(1, 500)))
    return Mask(q_seg, causal, k_seg, q_rows, k_rows)


def listed(count: torch.Tensor, index: torch.Tensor) -> set[tuple[int, int, int]]:
    """(batch, row block, column block) of one of a BlockMask's four lists."""
    return {
        (b, row, int(column))
        for b in range(count.shape[0])
        for row in range(count.shape[2])
        for column in index[b, 0, row, : int(count[b, 0, row])]
    }


def flipped(blocks: set[tuple[int, int, int]]) -> set[tuple[int, int, int]]:
    return {(b, column, row) for b, row, column in blocks}


@settings(max_examples=60, deadline=None)
@given(masks())
def test_every_allowed_pair_is_in_a_block_and_whole_blocks_are_wholly_allowed(mask):
    pairs, blocks = torch.as_tensor(allowed_pairs(mask)), block_mask(mask)
    partly = listed(blocks.kv_num_blocks, blocks.kv_indices)
    whole = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not partly & whole
    for b, q, k in {(int(b), int(q) // BLOCK, int(k) // BLOCK) for b, q, k in pairs.nonzero()}:
        assert (b, q, k) in partly | whole
    for b, q, k in whole:
        part = pairs[b, q * BLOCK : (q + 1) * BLOCK, k * BLOCK : (k + 1) * BLOCK]
        assert part.shape == (BLOCK, BLOCK) and part.all()
    # The backward walks the same blocks by columns.
    assert listed(blocks.q_num_blocks, blocks.q_indices) == flipped(partly)
    assert listed(blocks.full_q_num_blocks, blocks.full_q_indices) == flipped(whole)


def test_long_segments_make_whole_blocks_and_far_blocks_are_left_out():
    blocks = block_mask(Mask(packed([[512, 512]], 1024), causal=True))
    assert listed(blocks.full_kv_num_blocks, blocks.full_kv_indices) == {
        (0, first + q, first + k) for first in (0, 4) for q in range(4) for k in range(q)
    }
    assert listed(blocks.kv_num_blocks, blocks.kv_indices) == {(0, i, i) for i in range(8)}


def test_blocks_of_padding_are_never_listed():
    """Two of them hold one value all over, as the blocks of one long segment do."""
    blocks = block_mask(Mask(packed([[128], [1]], 512), causal=False))
    assert listed(blocks.full_kv_num_blocks, blocks.full_kv_indices) == {(0, 0, 0)}
    assert listed(blocks.kv_num_blocks, blocks.kv_indices) == {(1, 0, 0)}


SEGMENTS = packed([[130, 1, 60, 99], [300]], 333)
PERMUTED = torch.randperm(333, generator=torch.Generator().manual_seed(0))
MASKS = {
    "images": Mask(SEGMENTS, causal=False),
    "documents": Mask(SEGMENTS, causal=True),
    "a multiple of the block": Mask(packed([[100, 156], [20, 20]], 256), causal=True),
    "nothing but padding": Mask(torch.full((2, 140), -1, dtype=torch.int32), causal=True),
    "predicate": Mask(SEGMENTS, causal=True, predicate=lambda b, q, k: (q - k) % 3 != 1),
    "some of the queries": Mask(
        SEGMENTS[:, PERMUTED[:100]],
        causal=True,
        kv_segments=SEGMENTS,
        rows=PERMUTED[:100].int().expand(2, -1),
        kv_rows=torch.arange(333, dtype=torch.int32).expand(2, -1),
    ),
}


def inputs(mask: Mask, heads: int = 4, kv_heads: int = 2, width: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    Q, K = mask.segments.shape[1], mask.keys().shape[1]
    return tuple(
        torch.randn(2, n, h, width, generator=generator)
        for n, h in ((Q, heads), (K, kv_heads), (K, kv_heads))
    )


@pytest.mark.parametrize("name", MASKS)
def test_flex_and_sdpa_equal_dense_attention(name):
    mask = MASKS[name]
    q, k, v = inputs(mask)
    allowed = mask.dense()[:, 0] if mask.predicate else torch.as_tensor(allowed_pairs(mask))
    expected = dense_attention(q, k, v, allowed)
    for backend in ("flex", "sdpa"):
        result = InnerAttention(backend)(q, k, v, prepare_mask(mask, backend))
        assert (result - expected).abs().max() < 1e-5, backend
        assert not result[~allowed.any(-1)].any(), backend


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "documents", "some of the queries"])
def test_compiled_flex_reads_the_block_mask(name):
    """Eager FlexAttention computes all scores; the compiled kernel skips what the block mask leaves out."""
    mask = MASKS[name]
    q, k, v = inputs(mask)
    attend = torch.compile(InnerAttention("flex"), fullgraph=True, dynamic=False)
    blocks = prepare_mask(mask, "flex")
    with torch.no_grad():
        assert (attend(q, k, v, blocks) - dense_attention(q, k, v, allowed_pairs(mask))).abs().max() < 1e-5
        # With no blocks listed nothing is computed: the lists are what is read, not the mask function alone.
        none, none_whole = torch.zeros_like(blocks.kv_num_blocks), torch.zeros_like(blocks.full_kv_num_blocks)
        empty = BlockMask.from_kv_blocks(
            none,
            blocks.kv_indices,
            none_whole,
            blocks.full_kv_indices,
            BLOCK,
            blocks.mask_mod,
            blocks.seq_lengths,
        )
        assert not attend(q, k, v, empty).any()
