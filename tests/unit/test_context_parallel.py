"""Which tokens of a slot a context-parallel rank holds."""

import numpy as np
import pytest
import torch

from torchtitan.distributed.context_parallel import causal_cost, in_slot_order, rows_of_ranks


def documents(*lengths: int, total: int) -> torch.Tensor:
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor([ids + [-1] * (total - len(ids))], dtype=torch.int32)


def pairs_of_ranks(ids: torch.Tensor, rows_BRQ: torch.Tensor) -> np.ndarray:
    """Allowed pairs of each rank, counted one by one."""
    row = np.arange(ids.shape[1])
    allowed = (
        (ids[0, :, None] == ids[0, None, :]).numpy()
        & (ids[0, :, None] >= 0).numpy()
        & (row[:, None] >= row[None, :])
    )
    return allowed.sum(1)[rows_BRQ[0].numpy()].sum(1)


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_row_is_on_one_rank_and_each_rank_has_as_many(ranks, balance):
    ids = torch.cat((documents(100, 60, 90, total=256), documents(256, total=256)))
    rows = rows_of_ranks(ids, ranks, balance)
    assert rows.shape == (2, ranks, 256 // ranks)
    for slot in rows:
        assert torch.equal(slot.flatten().sort().values, torch.arange(256))
        assert (slot.diff() > 0).all(), "ascending, so that a rank's tokens form few runs"


def test_cost_is_the_number_of_keys_a_token_sees():
    assert causal_cost(documents(3, 1, 2, total=8).numpy()).tolist() == [[1, 2, 3, 1, 1, 2, 0, 0]]


@pytest.mark.parametrize(
    "lengths",
    [(4096,), (1024,) * 4, (2048,) + (128,) * 16, (3072,) + (128,) * 8, (128,) * 8 + (3072,), (1000, 3000)],
    ids=str,
)
def test_no_rank_has_much_more_attention_than_another(lengths):
    """Dealt in order, one long document before short ones gives the last rank of four up to 2.8 times the
    mean.
    """
    ids = documents(*lengths, total=4096)
    pairs = pairs_of_ranks(ids, rows_of_ranks(ids, 4, balance=True))
    assert pairs.max() / pairs.mean() < 1.03


def test_in_order_the_ranks_are_far_from_balanced():
    ids = documents(2048, *(128,) * 16, total=4096)
    pairs = pairs_of_ranks(ids, rows_of_ranks(ids, 4, balance=False))
    assert pairs.max() / pairs.mean() > 2.5


def test_what_ranks_hold_side_by_side_comes_back_in_order():
    ids = torch.cat((documents(40, 24, total=64), documents(64, total=64)))
    rows = rows_of_ranks(ids, 4, balance=True).flatten(1)
    slots = torch.randn(2, 64, 3)
    gathered = torch.stack([slot[order] for slot, order in zip(slots, rows, strict=True)])
    assert torch.equal(in_slot_order(gathered, rows), slots)
