"""The description of a mask against a loop over every pair."""

import pytest
import torch

from torchtitan.layers.masks import Mask

Q_SEG = torch.tensor([[0, 0, 0, 1, 1, -1], [-1, 2, 2, 2, 0, 0]], dtype=torch.int32)
K_SEG = torch.tensor([[1, 0, 0, -1], [2, 0, 2, -1]], dtype=torch.int32)
Q_ROWS = torch.tensor([[4, 0, 2, 1, 5, 3], [5, 4, 3, 2, 1, 0]], dtype=torch.int32)
K_ROWS = torch.tensor([[1, 0, 2, 3], [3, 0, 1, 2]], dtype=torch.int32)

MASKS = {
    "square": Mask(Q_SEG, causal=False),
    "causal": Mask(Q_SEG, causal=True),
    "permuted": Mask(Q_SEG, causal=True, kv_segments=Q_SEG, rows=Q_ROWS, kv_rows=Q_ROWS),
    "rectangular": Mask(Q_SEG, causal=False, kv_segments=K_SEG),
    "rectangular, causal": Mask(Q_SEG, causal=True, kv_segments=K_SEG, rows=Q_ROWS, kv_rows=K_ROWS),
    "predicate": Mask(Q_SEG, causal=True, predicate=lambda b, q, k: (q + k + b) % 2 == 0),
}


def allowed(mask: Mask, b: int, q: int, k: int) -> bool:
    """One pair, in words: same segment, not padding, the key's row not after the query's, and what the
    predicate says.
    """
    keys = mask.segments if mask.kv_segments is None else mask.kv_segments
    q_row = q if mask.rows is None else int(mask.rows[b, q])
    k_row = k if mask.kv_rows is None else int(mask.kv_rows[b, k])
    segment = int(mask.segments[b, q])
    if segment < 0 or segment != int(keys[b, k]) or (mask.causal and q_row < k_row):
        return False
    return mask.predicate is None or bool(mask.predicate(torch.tensor(b), torch.tensor(q), torch.tensor(k)))


@pytest.mark.parametrize("name", MASKS)
def test_dense_mask_equals_every_pair(name):
    mask = MASKS[name]
    dense = mask.dense()
    B, Q, K = mask.segments.shape[0], mask.segments.shape[1], mask.keys().shape[1]
    assert dense.shape == (B, 1, Q, K)
    for b in range(B):
        for q in range(Q):
            for k in range(K):
                assert bool(dense[b, 0, q, k]) == allowed(mask, b, q, k), (b, q, k)


def test_the_picture_in_the_docstring():
    mask = Mask(torch.tensor([[0, 0, 0, 1, 1, -1]], dtype=torch.int32), causal=True)
    drawn = ["x.....", "xx....", "xxx...", "...x..", "...xx.", "......"]
    assert ["".join("x" if a else "." for a in row) for row in mask.dense()[0, 0].tolist()] == drawn
