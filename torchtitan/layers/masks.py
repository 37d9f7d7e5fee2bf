"""A mask as data: who may attend to whom, described once and turned by each backend into what it needs.

Letters: B batch rows, Q queries, K keys. For causal documents 0 0 0 1 1 -1 (rows attend to columns marked x):

        0 0 0 1 1 -
    0   x . . . . .
    0   x x . . . .
    0   x x x . . .
    1   . . . x . .
    1   . . . x x .
    -   . . . . . .
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# (batch, query, key) -> bool; int tensors, places in the tensor
Predicate = Callable[[Tensor, Tensor, Tensor], Tensor]


class Mask(NamedTuple):
    """Queries attend to keys of their own segment; -1 is padding, which neither attends nor is attended to.

    Where a tensor does not hold its slot in order (context parallel), `rows` and `kv_rows` say which row of
    the slot each entry is: causality is never derived from the place in the tensor. Keys default to the
    queries.
    """

    segments: Tensor  # int32 [B, Q]
    causal: bool
    kv_segments: Tensor | None = None  # int32 [B, K]
    rows: Tensor | None = None  # int32 [B, Q]
    kv_rows: Tensor | None = None  # int32 [B, K]
    predicate: Predicate | None = None  # a further condition, where segments and order are not enough

    def keys(self) -> Tensor:
        """int32 [B, K]: segments of the keys."""
        return self.segments if self.kv_segments is None else self.kv_segments

    def query_rows(self) -> Tensor:
        """int32 [B, Q]: row of the slot that each query is."""
        return _arange_like(self.segments) if self.rows is None else self.rows

    def key_rows(self) -> Tensor:
        """int32 [B, K]: row of the slot that each key is."""
        if self.kv_rows is not None:
            return self.kv_rows
        return self.query_rows() if self.kv_segments is None else _arange_like(self.kv_segments)

    def dense(self) -> Tensor:
        """bool [B, 1, Q, K]; True where attention is allowed."""
        q_seg, k_seg = self.segments[:, None, :, None], self.keys()[:, None, None, :]
        allowed = (q_seg == k_seg) & (q_seg >= 0)
        if self.causal:
            allowed = allowed & (self.query_rows()[:, None, :, None] >= self.key_rows()[:, None, None, :])
        if self.predicate is not None:
            b = torch.arange(q_seg.shape[0], device=q_seg.device)[:, None, None, None]
            q = torch.arange(q_seg.shape[2], device=q_seg.device)[None, None, :, None]
            k = torch.arange(k_seg.shape[3], device=q_seg.device)[None, None, None, :]
            allowed = allowed & self.predicate(b, q, k)
        return allowed


def _arange_like(segments: Tensor) -> Tensor:
    return torch.arange(segments.shape[1], dtype=torch.int32, device=segments.device).expand_as(segments)
