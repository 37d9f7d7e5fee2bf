"""Chunked cross-entropy against PyTorch's on all logits at once."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference.live_memory import LiveMemory
from tests.reference.ranks import on_two_ranks
from torchtitan.layers.cross_entropy import (
    add_up,
    cross_entropy_sum,
    token_scores,
)

T, D, V = 45, 24, 70


def problem(
    dtype: torch.dtype = torch.float32, tokens: int = T, vocabulary: int = V
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, D, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, D, generator=generator) / 4).to(dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[::5] = -100
    return h.requires_grad_(), weight.requires_grad_(), labels


def all_at_once(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((h @ weight.T).float(), labels, ignore_index=-100, reduction="sum")


def as_it_is(function):
    """The passes of a GPU, one operator after the other."""
    return function


@pytest.mark.parametrize("fuse", [None, as_it_is])
@pytest.mark.parametrize("chunk", [1, 7, 45, 1000])
def test_loss_and_gradients_equal_all_logits_at_once(chunk, fuse):
    h, weight, labels = problem()
    loss = cross_entropy_sum(h, weight, labels, chunk, fuse=fuse)
    expected = all_at_once(h, weight, labels)
    assert loss.shape == (1,) and loss.dtype == torch.float32
    assert abs(loss.item() / expected.item() - 1) < 1e-6
    # Scaled by the trainer before backward: a gradient other than 1 comes in.
    gradients = torch.autograd.grad((loss / 13).sum(), (h, weight))
    for a, b in zip(gradients, torch.autograd.grad(expected / 13, (h, weight)), strict=True):
        assert (a - b).abs().max() < 1e-6
    assert not gradients[0][labels < 0].any()


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen):
    h, weight, labels = problem()
    both = torch.autograd.grad(cross_entropy_sum(h, weight, labels, 8).sum(), (h, weight))
    kept = h if frozen == "head" else weight
    (weight if frozen == "head" else h).requires_grad_(False)
    (gradient,) = torch.autograd.grad(cross_entropy_sum(h, weight, labels, 8).sum(), (kept,))
    assert torch.equal(gradient, both[0 if frozen == "head" else 1])


def test_without_gradients_only_the_loss_is_made():
    h, weight, labels = problem()
    with torch.no_grad():
        loss = cross_entropy_sum(h, weight, labels, 8)
    assert not loss.requires_grad and abs(loss.item() / all_at_once(h, weight, labels).item() - 1) < 1e-6


def test_bfloat16_sums_in_float32():
    h, weight, labels = problem(torch.bfloat16)
    loss, expected = cross_entropy_sum(h, weight, labels, 8), all_at_once(h, weight, labels)
    assert abs(loss.item() / expected.item() - 1) < 1e-6
    gradients = torch.autograd.grad(loss.sum(), (h, weight))
    for a, b in zip(gradients, torch.autograd.grad(expected, (h, weight)), strict=True):
        assert a.dtype == torch.bfloat16 and (a - b).abs().max() < 0.01 * b.abs().max()


@pytest.mark.parametrize("chunk", [7, 1000])
def test_the_loss_of_each_source_is_that_of_its_tokens_alone(chunk):
    h, weight, labels = problem()
    source_ids = torch.randint(-1, 3, (T,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    labels[source_ids < 0] = -100
    losses = cross_entropy_sum(h, weight, labels, chunk, None, source_ids, 4)  # nothing is of the fourth
    alone = [all_at_once(h, weight, labels.where(source_ids == source, -100)) for source in range(4)]
    assert losses[1:].tolist() == pytest.approx([float(loss) for loss in alone], rel=1e-6)
    assert losses[1:].sum().item() == pytest.approx(losses[0].item(), rel=1e-6) and losses[4] == 0


def test_telling_sources_apart_changes_no_bit_of_the_loss_and_its_gradients():
    h, weight, labels = problem()
    source_ids = torch.arange(T, dtype=torch.int32) % 3
    plain = cross_entropy_sum(h, weight, labels, 8)
    told = cross_entropy_sum(h, weight, labels, 8, None, source_ids, 3)
    assert torch.equal(told[:1], plain)
    # Whatever gradient the parts of the sources get, the loss alone is trained on.
    gradients = torch.autograd.grad((told / torch.tensor([13, 5, 3, 1])).sum(), (h, weight))
    for a, b in zip(gradients, torch.autograd.grad((plain / 13).sum(), (h, weight)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("microbatches", [1, 2, 9, 40])
def test_the_sum_over_microbatches_does_not_depend_on_the_sources(microbatches):
    losses = torch.randn(microbatches, 4, generator=torch.Generator().manual_seed(3))
    together = add_up(list(losses))
    assert torch.equal(together[:1], torch.stack(list(losses[:, :1])).sum(0))
    assert torch.allclose(together, losses.double().sum(0).float(), atol=1e-6)


def test_large_logits_do_not_overflow():
    h, weight, labels = problem()
    loss = cross_entropy_sum(h * 1e4, weight, labels, 8)
    assert loss.isfinite().all() and abs(loss.item() / all_at_once(h * 1e4, weight, labels).item() - 1) < 1e-5


def test_no_label_at_all_is_zero_loss_and_zero_gradient():
    h, weight, labels = problem()
    loss = cross_entropy_sum(h, weight, torch.full_like(labels, -100), 8)
    gradients = torch.autograd.grad(loss.sum(), (h, weight))
    assert loss.item() == 0 and not any(gradient.any() for gradient in gradients)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("per_token", [False, True])
def test_all_logits_never_exist(per_token):
    tokens, vocabulary, chunk = 512, 600, 16
    h, weight, labels = problem(tokens=tokens, vocabulary=vocabulary)
    with LargestTensor() as largest:
        if per_token:
            token_scores(h, weight, labels, chunk)
        else:
            cross_entropy_sum(h, weight, labels, chunk).sum().backward()
    assert largest.numel == max(vocabulary * D, chunk * vocabulary, tokens * D) < tokens * vocabulary / 10


@pytest.mark.parametrize("per_token", [False, True])
def test_the_logits_of_a_chunk_are_gone_before_the_next(per_token):
    tokens, vocabulary, chunk = 512, 4000, 128
    h, weight, labels = problem(torch.bfloat16, tokens, vocabulary)
    with LiveMemory() as memory:
        if per_token:
            token_scores(h, weight, labels, chunk)
        else:
            cross_entropy_sum(h, weight.detach(), labels, chunk)
    # In bfloat16 and in float32 at once; weights and tokens are small in comparison.
    assert memory.peak < 1.2 * (2 + 4) * chunk * vocabulary


def test_token_scores_equal_all_logits():
    h, weight, labels = problem()
    scores, logits, valid = token_scores(h, weight, labels, 7), h @ weight.T, labels >= 0
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    assert (scores[:, 0] - expected).abs().max() < 1e-5
    assert torch.equal(scores[:, 1] == 1, valid & (logits.argmax(-1) == labels))
    assert not scores[~valid].any()


def _on_rank(rank: int) -> tuple[torch.Tensor, ...]:
    h, weight, labels = problem()
    share = weight.detach().chunk(2)[rank].requires_grad_()
    loss = cross_entropy_sum(h, share, labels, 8, dist.group.WORLD)
    loss.sum().backward()
    return loss.detach(), h.grad, share.grad, token_scores(h, share, labels, 8, dist.group.WORLD)


def test_a_vocabulary_split_over_ranks_gives_the_same(tmp_path):
    losses, bodies, heads, scores = zip(*on_two_ranks(_on_rank, tmp_path), strict=True)
    h, weight, labels = problem()
    expected = cross_entropy_sum(h, weight, labels, 8)
    expected.sum().backward()
    for rank in range(2):
        assert abs(losses[rank].item() / expected.item() - 1) < 1e-6
        assert (scores[rank] - token_scores(h, weight, labels, 8)).abs().max() < 1e-5
    assert (sum(bodies) - h.grad).abs().max() < 1e-6  # each rank has its part of a sum
    assert (torch.cat(heads) - weight.grad).abs().max() < 1e-6


def tied_problem() -> tuple[torch.Tensor, ...]:
    """Each token's highest logit is that of two to four words,
    of which each half of the vocabulary has some.
    """
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(V, D, generator=generator)
    copies = [3, 30, 40, 69]
    weight[copies] = 4 * weight[3]
    weight[[7, 50]] = 4 * weight[7]
    h = weight[torch.tensor([3, 7] * 20)] + 0.01 * torch.randn(40, D, generator=generator)
    labels = torch.tensor([*copies, 7, 50] * 7)[:40]
    return h, weight, labels


def _tied_on_rank(rank: int) -> torch.Tensor:
    h, weight, labels = tied_problem()
    return token_scores(h, weight.chunk(2)[rank], labels, 8, dist.group.WORLD)


def test_of_equally_likely_tokens_only_the_first_is_right(tmp_path):
    h, weight, labels = tied_problem()
    logits = h @ weight.T
    tied = logits.gather(-1, labels[:, None])[:, 0] == logits.amax(-1)
    expected = logits.argmax(-1) == labels
    assert 0 < expected.sum() < tied.sum(), "some labels tie for the first place and do not come first"
    assert torch.equal(token_scores(h, weight, labels, 8)[:, 1] == 1, expected)
    for scores in on_two_ranks(_tied_on_rank, tmp_path):
        assert torch.equal(scores[:, 1] == 1, expected)
