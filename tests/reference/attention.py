"""Attention and its mask, the plain way: every pair of a query and a key, in float64."""

import numpy as np
import torch
from torch import Tensor

from torchtitan.layers.masks import Mask


def allowed_pairs(mask: Mask) -> np.ndarray:
    """bool [B, Q, K] from the description alone (without predicate): same segment, not padding, key's row not
    after query's.
    """
    q_seg = mask.segments.cpu().numpy()
    k_seg = q_seg if mask.kv_segments is None else mask.kv_segments.cpu().numpy()
    q_row = (
        np.broadcast_to(np.arange(q_seg.shape[1]), q_seg.shape)
        if mask.rows is None
        else mask.rows.cpu().numpy()
    )
    k_row = (
        np.broadcast_to(np.arange(k_seg.shape[1]), k_seg.shape)
        if mask.kv_rows is None
        else mask.kv_rows.cpu().numpy()
    )
    allowed = (q_seg[:, :, None] == k_seg[:, None, :]) & (q_seg[:, :, None] != -1)
    return allowed & (q_row[:, :, None] >= k_row[:, None, :]) if mask.causal else allowed


def dense_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | np.ndarray) -> Tensor:
    """q [B, Q, H, E], k and v [B, K, G, E], allowed bool [B, Q, K] -> [B, Q, H, E], zeros where nothing is
    allowed.
    """
    allowed = torch.as_tensor(allowed, device=q.device)[:, None]
    share = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(share, 2).double(), v.repeat_interleave(share, 2).double()
    scores = torch.einsum("bqhe,bkhe->bhqk", q.double(), k) / q.shape[-1] ** 0.5
    weights = scores.exp() * allowed
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1.0)
    return torch.einsum("bhqk,bkhe->bqhe", weights, v).to(q.dtype)


def packed(lengths: list[list[int]], total: int) -> Tensor:
    """int32 [B, total]: segments of these lengths one after the other, then padding."""
    segments = torch.full((len(lengths), total), -1, dtype=torch.int32)
    for b, row in enumerate(lengths):
        names = torch.arange(len(row), dtype=torch.int32).repeat_interleave(
            torch.tensor(row, dtype=torch.long)
        )
        segments[b, : len(names)] = names
    return segments
