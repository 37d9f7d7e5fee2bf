"""One attention call, several backends behind it.

A backend prepares a mask once per step for all layers, and attends with what it prepared. A further backend
(variable-length flash kernels, say) is one pair of functions and one row of BACKENDS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.layers.flex import block_mask, flex
from torchtitan.layers.masks import Mask
from torchtitan.layers.segment_attention import segment_attention


class _Segments(NamedTuple):
    q_seg: Tensor
    k_seg: Tensor
    q_row: Tensor
    k_row: Tensor
    causal: bool


def _prepare_sdpa(mask: Mask) -> _Segments | Tensor:
    """Segments where the description allows it (CPU, no predicate), else the dense bool mask [B, 1, Q, K]."""
    # On the meta device as on CPU: what is kept is then what FlexAttention keeps on GPU too.
    if mask.segments.device.type not in ("cpu", "meta") or mask.predicate is not None:
        return mask.dense()
    return _Segments(
        mask.segments, mask.keys(), mask.query_rows().contiguous(), mask.key_rows().contiguous(), mask.causal
    )


def _sdpa(q_BQHE: Tensor, k_BKGE: Tensor, v_BKGE: Tensor, prepared: _Segments | Tensor) -> Tensor:
    if isinstance(prepared, _Segments):
        return segment_attention(q_BQHE, k_BKGE, v_BKGE, *prepared)[0]
    q, k, v = (x.transpose(1, 2) for x in (q_BQHE, k_BKGE, v_BKGE))
    # Some CUDA kernels give NaN for a row that may attend to nothing: let it see all keys, then take zeros.
    empty = ~prepared.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=prepared | empty, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.masked_fill(empty, 0.0).transpose(1, 2)


class Backend(NamedTuple):
    """A pair of functions: the second reads what the first makes of a mask."""

    prepare: Callable[[Mask], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]


BACKENDS = {"flex": Backend(block_mask, flex), "sdpa": Backend(_prepare_sdpa, _sdpa)}


def resolve_backend(name: str, device_type: str) -> str:
    """`auto` is flex on GPU and sdpa on CPU, where FlexAttention has no backward."""
    return ("sdpa" if device_type == "cpu" else "flex") if name == "auto" else name


class InnerAttention(nn.Module):
    """Attention without its projections. A module, so that a layout (context parallel) can take its place."""

    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend

    def forward(self, q_BQHE: Tensor, k_BKGE: Tensor, v_BKGE: Tensor, prepared: Any) -> Tensor:
        """-> [B, Q, H, E]. A query that may attend to nothing gives zeros.

        `prepared` is what `prepare` of the same backend gave.
        """
        return BACKENDS[self.backend].attend(q_BQHE, k_BKGE, v_BKGE, prepared)


def prepare_mask(mask: Mask, backend: str) -> Any:
    """What attention with this backend takes as its mask; once per step for all layers."""
    with torch.no_grad():
        return BACKENDS[backend].prepare(mask)
