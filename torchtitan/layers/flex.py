"""FlexAttention from a mask description: block mask built on the device, once per step for all layers.

Which blocks can hold an allowed pair follows from the lowest and highest segment and row of each block, so
building it costs (Q / 128) * (K / 128), not Q * K. Paper: FlexAttention (Dong et al., 2024).
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from torchtitan.layers.masks import Mask

BLOCK = 128


class _Bounds(NamedTuple):
    """Per block of 128 rows, all int32 [B, blocks]. Padding has segment -1 and counts only in `low`."""

    low: Tensor  # lowest segment, -1 where there is padding
    low_valid: Tensor  # lowest segment that is not padding
    high: Tensor  # highest segment, -1 where there is nothing but padding
    first: Tensor  # lowest row
    last: Tensor  # highest row


def _bounds(segments: Tensor, rows: Tensor) -> _Bounds:
    short = -segments.shape[1] % BLOCK
    segments, rows = F.pad(segments, (0, short), value=-1), F.pad(rows, (0, short))
    seg, row = segments.unflatten(1, (-1, BLOCK)), rows.unflatten(1, (-1, BLOCK))
    no_segment = torch.iinfo(seg.dtype).max
    return _Bounds(
        seg.amin(-1), seg.where(seg >= 0, no_segment).amin(-1), seg.amax(-1), row.amin(-1), row.amax(-1)
    )


def _blocks(mask: Mask) -> tuple[Tensor, Tensor]:
    """bool [B, 1, Q blocks, K blocks] twice: partly allowed (to be masked inside), wholly allowed."""
    q, k = _bounds(mask.segments, mask.query_rows()), _bounds(mask.keys(), mask.key_rows())
    q, k = _Bounds(*(x[:, :, None] for x in q)), _Bounds(*(x[:, None, :] for x in k))
    some = (q.high >= 0) & (k.high >= 0) & (q.low_valid <= k.high) & (k.low_valid <= q.high)
    whole = (q.low >= 0) & (q.low == q.high) & (q.low == k.low) & (q.low == k.high)
    if mask.causal:
        some = some & (q.last >= k.first)
        whole = whole & (q.first >= k.last)
    if mask.predicate is not None:
        whole = torch.zeros_like(whole)
    return (some & ~whole)[:, None], whole[:, None]


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [..., K] -> how many are set, and their indices first: what a BlockMask is made of."""
    count = blocks.sum(-1, dtype=torch.int32)
    return count, torch.argsort(blocks.int(), dim=-1, descending=True, stable=True).int()


def block_mask(mask: Mask) -> BlockMask:
    """The mask as FlexAttention takes it, built on the mask's own device without a synchronisation.

    Not compiled: for a sort over a hundred blocks Triton makes a kernel that ptxas needs minutes for.
    """
    partly, whole = _blocks(mask)
    return BlockMask.from_kv_blocks(
        *_ordered(partly),
        *_ordered(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(mask),
        seq_lengths=(mask.segments.shape[1], mask.keys().shape[1]),
    )


def _mask_mod(mask: Mask):
    q_seg, k_seg, causal, predicate = mask.segments, mask.keys(), mask.causal, mask.predicate
    q_row, k_row = mask.query_rows().contiguous(), mask.key_rows().contiguous()

    def allowed(b, h, q, k):
        inside = (q_seg[b, q] == k_seg[b, k]) & (q_seg[b, q] >= 0)
        if causal:
            inside = inside & (q_row[b, q] >= k_row[b, k])
        return inside if predicate is None else inside & predicate(b, q, k)

    return allowed


@functools.cache
def _compiled_flex():
    # The shapes of both towers in training, in validation, and in every width that answers are read in; the
    # default of 8 would leave the last of them to eager kernels.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False)


def flex(q_BQHE: Tensor, k_BKGE: Tensor, v_BKGE: Tensor, mask: BlockMask) -> Tensor:
    """Traced with a compiled block; outside one compiled by itself on GPU, as eager it holds all scores."""
    q, k, v = (x.transpose(1, 2) for x in (q_BQHE, k_BKGE, v_BKGE))
    alone = q.is_cuda and not torch.compiler.is_compiling()
    attend = _compiled_flex() if alone else flex_attention
    return attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
