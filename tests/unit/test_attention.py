"""The attention call: which backend, and the dense path that a GPU checks itself with."""

import pytest
import torch

from tests.reference.attention import allowed_pairs, dense_attention
from torchtitan.layers.attention import InnerAttention, prepare_mask, resolve_backend
from torchtitan.layers.masks import Mask

SEGMENTS = torch.tensor([[0] * 9 + [1] * 14 + [-1] * 7, [2] * 25 + [-1] * 5], dtype=torch.int32)


def everything(b: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Forbids nothing, but makes the backend take the dense mask."""
    return (b + q + k) >= 0


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [("auto", "cpu", "sdpa"), ("auto", "cuda", "flex"), ("sdpa", "cuda", "sdpa")],
)
def test_auto_is_flex_where_it_has_a_backward(name, device, expected):
    assert resolve_backend(name, device) == expected


@pytest.mark.parametrize("causal", [False, True])
def test_dense_path_equals_dense_attention_with_gradients(causal):
    mask = Mask(SEGMENTS, causal, predicate=everything)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 30, h, 16, generator=generator).requires_grad_() for h in (4, 2, 2)]
    weights = torch.randn(2, 30, 4, 16, generator=generator)
    out = InnerAttention("sdpa")(*tensors, prepare_mask(mask, "sdpa"))
    expected = dense_attention(*tensors, allowed_pairs(Mask(SEGMENTS, causal)))
    assert (out - expected).abs().max() < 1e-5
    assert not out[SEGMENTS < 0].any()
    gradients, wanted = (torch.autograd.grad((x * weights).sum(), tensors) for x in (out, expected))
    for a, b in zip(gradients, wanted, strict=True):
        assert (a - b).abs().max() < 1e-5
        assert not a[SEGMENTS < 0].any()


def test_a_predicate_that_forbids_is_obeyed():
    """Bidirectional inside a span, and a branch that does not see its sibling."""
    branch = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4], dtype=torch.int32)

    def sees(b, q, k):
        return (branch[b, k] == 0) | (branch[b, q] == branch[b, k])

    mask = Mask(torch.zeros(1, 12, dtype=torch.int32), causal=True, predicate=sees)
    q, k, v = torch.randn(3, 1, 12, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    allowed = torch.ones(12, 12).tril().bool()
    allowed[8:, 4:8] = False
    result = InnerAttention("sdpa")(q, k, v, prepare_mask(mask, "sdpa"))
    assert (result - dense_attention(q, k, v, allowed[None])).abs().max() < 1e-5
