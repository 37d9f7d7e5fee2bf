"""Context parallel: the ranks of a group share every slot, each holding S / cp of its tokens.

Two ways for attention to see the whole slot:

    allgather   keys and values of all ranks are gathered; queries stay (Llama 3, arXiv 2407.21783, 3.3)
    ulysses     one all-to-all gives each rank all tokens of some heads, one brings them back (arXiv
                2309.14509)

Under causal attention inside documents, tokens late in a long document cost most. So for `allgather` a slot
is cut into blocks which are dealt by cost, an equal number to each rank, anew for every slot. Nothing puts
the tokens back in order: each carries its row in the slot, and masks ask the row (layers/masks.py).

Letters: B slots, S tokens, R ranks, Q tokens a rank (S / R), H heads, G key-value heads, E width of a head.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config.layout import BALANCE_BLOCKS
from torchtitan.distributed.differentiable import exchange, gather
from torchtitan.layers.attention import InnerAttention

KERNEL_BLOCK = 128  # FlexAttention skips blocks of this many tokens, so finer cuts would waste its work


class GatheredAttention(InnerAttention):
    """Own queries against the keys and values of all ranks. The mask says which row each of them is."""

    def __init__(self, backend: str, group: ProcessGroup):
        super().__init__(backend)
        self.group = group

    def forward(self, q_BQHE: Tensor, k_BQGE: Tensor, v_BQGE: Tensor, prepared: Any) -> Tensor:
        """Queries [B, Q, H, E] of this rank, its keys and values [B, Q, G, E] -> [B, Q, H, E]."""
        both_BSGE = gather(torch.cat((k_BQGE, v_BQGE), 2), 1, self.group)
        k_BSGE, v_BSGE = both_BSGE.chunk(2, 2)
        return super().forward(q_BQHE, k_BSGE, v_BSGE, prepared)


class UlyssesAttention(InnerAttention):
    """All tokens, and 1 / R of the heads, on each rank. The mask is that of the whole slots."""

    def __init__(self, backend: str, group: ProcessGroup):
        super().__init__(backend)
        self.group = group

    def forward(self, q_BQHE: Tensor, k_BQGE: Tensor, v_BQGE: Tensor, prepared: Any) -> Tensor:
        """Queries [B, Q, H, E] of this rank, its keys and values [B, Q, G, E] -> [B, Q, H, E]."""
        ranks = self.group.size()
        by_rank = [rearrange(x, "B Q (R h) E -> B Q R h E", R=ranks) for x in (q_BQHE, k_BQGE, v_BQGE)]
        mine = _tokens_for_heads(torch.cat(by_rank, 3), self.group)
        q, k, v = mine.split([x.shape[3] for x in by_rank], 2)
        return _heads_for_tokens(super().forward(q, k, v, prepared), self.group)


def _tokens_for_heads(x_BQRhE: Tensor, group: ProcessGroup) -> Tensor:
    """[B, Q, R, h, E], heads grouped by the rank that gets them -> [B, S, h, E], tokens in rank order."""
    received_RBQhE = exchange(rearrange(x_BQRhE, "B Q R h E -> R B Q h E"), group)
    return rearrange(received_RBQhE, "R B Q h E -> B (R Q) h E")


def _heads_for_tokens(x_BShE: Tensor, group: ProcessGroup) -> Tensor:
    """[B, S, h, E] -> [B, Q, H, E], the way back."""
    received_RBQhE = exchange(rearrange(x_BShE, "B (R Q) h E -> R B Q h E", R=group.size()), group)
    return rearrange(received_RBQhE, "R B Q h E -> B Q (R h) E")


METHODS = {"allgather": GatheredAttention, "ulysses": UlyssesAttention}


def apply_context_parallel(blocks: Iterable[nn.Module], mesh: DeviceMesh, method: str) -> None:
    """Give the attention of each block its view of the whole slot. `mesh` is that of cp.

    Applied before all other layouts.
    """
    for block in blocks:
        attention: Any = block.attention
        attention.inner = METHODS[method](attention.inner.backend, mesh.get_group())


def rows_of_ranks(document_ids_BS: Tensor, ranks: int, balance: bool) -> Tensor:
    """int64 [B, R, Q]: which rows of each slot a rank holds, ascending. On the host, with the batch."""
    slots, length = document_ids_BS.shape
    if not balance:
        return torch.arange(length).view(1, ranks, -1).expand(slots, -1, -1)
    blocks = _blocks_a_rank(length, ranks) * ranks
    cost = causal_cost(document_ids_BS.numpy()).reshape(slots, blocks, -1).sum(-1)
    dealt_BRb = torch.from_numpy(np.stack([_deal(slot, ranks) for slot in cost]))
    rows_KT = torch.arange(length).view(blocks, -1)
    return rows_KT[dealt_BRb].flatten(2)


def _blocks_a_rank(length: int, ranks: int) -> int:
    fine, rest = divmod(length, ranks * KERNEL_BLOCK)
    return fine if rest == 0 and fine >= BALANCE_BLOCKS else BALANCE_BLOCKS


def causal_cost(document_ids_BS: np.ndarray) -> np.ndarray:
    """int64 [B, S]: tokens that each attends to, itself and those before in its document; padding 0."""
    row = np.arange(document_ids_BS.shape[1])
    begins = np.diff(document_ids_BS, axis=1, prepend=-2) != 0
    first = np.maximum.accumulate(np.where(begins, row, 0), axis=1)
    return np.where(document_ids_BS >= 0, row - first + 1, 0)


def _deal(cost: np.ndarray, ranks: int) -> np.ndarray:
    """int64 [ranks, blocks a rank]: the most expensive first, each to the rank with the least so far."""
    room = len(cost) // ranks
    hands: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for block in np.argsort(-cost, kind="stable"):
        rank = min((r for r in range(ranks) if len(hands[r]) < room), key=load.__getitem__)
        hands[rank].append(int(block))
        load[rank] += int(cost[block])
    return np.sort(np.array(hands), axis=1)


def in_slot_order(gathered_BS: Tensor, rows_BS: Tensor) -> Tensor:
    """[B, S, ...] as ranks hold it -> in the order of the slot. `rows_BS`: the row of each entry."""
    order_BS = rows_BS.argsort(1)
    return gathered_BS[torch.arange(len(order_BS), device=order_BS.device)[:, None], order_BS]
