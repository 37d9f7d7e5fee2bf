"""Keys and values of what was read, so that each further token costs one token.

`KVCache.attach` puts a `CachedAttention` in the place of each layer's attention, as context parallel does; no
model file knows of it. The caller then sends new tokens alone, as many as it likes at once, and says where
they belong: the model's mask holds new tokens as queries and all places of the cache as keys. All shapes are
fixed, and the host plans every place, so nothing waits for the device.

Letters: B sequences of the cache, R of them in a call, Q new tokens of each, T places, G key-value heads,
E width of a head.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchtitan.layers.attention import InnerAttention


class KVCache:
    """How many tokens each sequence holds. `attach` it to a decoder, `append` before each forward."""

    def __init__(self, sequences: int, places: int, device: torch.device):
        """`places`: tokens that a sequence may have; one place more takes what pads a call."""
        self.lengths = [0] * sequences
        self.places = places
        self.device = device
        self.all_rows = False  # the call is of every sequence, in order
        self.rows_R1 = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.places_RQ = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def attach(self, blocks: Iterable[nn.Module], kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Take the place of the attention of each block. `kv_heads`: those that this rank computes."""
        shape = (len(self.lengths), self.places + 1, kv_heads, head_dim)
        for block in blocks:
            attention: Any = block.attention
            attention.inner = CachedAttention(attention.inner.backend, self, shape, dtype)

    def append(self, rows: Sequence[int], counts: Sequence[int], width: int) -> dict[str, Tensor]:
        """Make room for `counts[i]` tokens of sequence `rows[i]`, at the front of `width` columns each.

        Returns what the forward needs besides the tokens: `positions` int32 [R, Q], and document_ids, rows,
        kv_document_ids and kv_rows of its mask (layers/masks.py). Raises ValueError where a sequence is full.
        """
        column_Q, place_T = np.arange(width), np.arange(self.places + 1)
        begin_R1 = np.array([[self.lengths[row]] for row in rows])
        end_R1 = begin_R1 + np.array(counts)[:, None]
        if end_R1.max() > self.places:
            raise ValueError(f"the cache holds {self.places} tokens a sequence, not {end_R1.max()}")
        new_RQ = begin_R1 + column_Q < end_R1
        places_RQ = np.where(new_RQ, begin_R1 + column_Q, self.places)
        for row, end in zip(rows, end_R1[:, 0], strict=True):
            self.lengths[row] = int(end)
        self.all_rows = list(rows) == list(range(len(self.lengths)))
        self.rows_R1 = self._put(np.array(rows)[:, None], np.int64)
        self.places_RQ = self._put(places_RQ, np.int64)
        return {
            "positions": self._put(np.where(new_RQ, places_RQ, 0), np.int32),
            "document_ids": self._put(np.where(new_RQ, 0, -1), np.int32),
            "rows": self._put(places_RQ, np.int32),
            "kv_document_ids": self._put(np.where(place_T < end_R1, 0, -1), np.int32),
            "kv_rows": self._put(np.broadcast_to(place_T, (len(rows), len(place_T))), np.int32),
        }

    def crop(self, row: int, length: int) -> None:
        """Forget the tokens of a sequence from place `length` on; 0: it begins anew."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"sequence {row} holds {self.lengths[row]} tokens: it cannot be cut to {length}")
        self.lengths[row] = length

    def _put(self, values: np.ndarray, dtype: type) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype)).to(self.device, non_blocking=True)


class CachedAttention(InnerAttention):
    """Queries of the new tokens against all that their sequences hold."""

    keys: Tensor  # [B, T + 1, G, E], as are the values
    values: Tensor

    def __init__(self, backend: str, cache: KVCache, shape: Sequence[int], dtype: torch.dtype):
        """`shape`: of the buffers."""
        super().__init__(backend)
        self.cache = cache
        for name in ("keys", "values"):
            buffer = torch.zeros(*shape, dtype=dtype, device=cache.device)
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, q_RQHE: Tensor, k_RQGE: Tensor, v_RQGE: Tensor, prepared: Any) -> Tensor:
        """-> [R, Q, H, E]. The mask is that of KVCache.append."""
        rows_R1, places_RQ = self.cache.rows_R1, self.cache.places_RQ
        self.keys[rows_R1, places_RQ] = k_RQGE.to(self.keys.dtype)
        self.values[rows_R1, places_RQ] = v_RQGE.to(self.values.dtype)
        held_RTGE = [self.keys, self.values]
        if not self.cache.all_rows:  # else they need no copy
            held_RTGE = [held_BTGE[rows_R1[:, 0]] for held_BTGE in held_RTGE]
        k_RTGE, v_RTGE = (held.to(q_RQHE.dtype) for held in held_RTGE)
        return super().forward(q_RQHE, k_RTGE, v_RTGE, prepared)
