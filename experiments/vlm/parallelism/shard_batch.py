"""The part of a batch that a rank of a context- and tensor-parallel group keeps, cut on the host.

S of the batch's tensors     cp: this rank's rows of each slot; what places visual tokens also tp, between
                             blocks
N of the batch's tensors     this rank's share of the patch rows, where the group shares the encoder
rows, kv_rows, kv_document_ids     of `allgather`: where each token and each gathered key stands in its slot
"""

import torch
from torch import Tensor

from experiments.vlm.batch import FIELDS, PLACING
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.parallelism.encoder_parallel import own_rows
from torchtitan.distributed.context_parallel import in_slot_order, rows_of_ranks
from torchtitan.distributed.differentiable import gather
from torchtitan.distributed.mesh import Mesh


def shard_batch(tensors: dict[str, Tensor], mesh: Mesh, job: VLMJobConfig) -> dict[str, Tensor]:
    """A batch (experiments/vlm/batch.py) of the group -> this rank's arguments of the model."""
    mine = dict(tensors)
    if mesh.degrees.cp > 1:
        mine |= _own_tokens(tensors, mesh, job)
    if mesh.degrees.tp > 1:
        for name in (name for name in mine if name in PLACING):
            mine[name] = mine[name].chunk(mesh.degrees.tp, 1)[mesh.rank("tp")].contiguous()
    return mine | {name: own_rows(mine[name], job, mesh) for name in ("pixel_values", "grid_thw")}


def _own_tokens(tensors: dict[str, Tensor], mesh: Mesh, job: VLMJobConfig) -> dict[str, Tensor]:
    rows_BRQ = slot_rows(tensors, mesh, job)
    mine_BQ, all_BS = rows_BRQ[:, mesh.rank("cp")], rows_BRQ.flatten(1)
    # The letters of the S dimensions are in the contract, so a further field is sliced without being named
    # here.
    sliced = {
        name: torch.take_along_dim(tensor, mine_BQ.reshape(*mine_BQ.shape, *[1] * (tensor.dim() - 2)), 1)
        for name, tensor in tensors.items()
        if FIELDS[name].dims.startswith("BS")
    }
    if job.parallelism.context_parallel_method == "ulysses":
        # There each rank attends over whole slots, in order.
        return sliced | {"document_ids": tensors["document_ids"]}
    return sliced | {
        "rows": mine_BQ.to(torch.int32),
        "kv_rows": all_BS.to(torch.int32),
        "kv_document_ids": tensors["document_ids"].gather(1, all_BS),
    }


def whole_slots(scores_BQ2: Tensor, tensors: dict[str, Tensor], mesh: Mesh) -> Tensor:
    """Scores of each rank's tokens -> [B, S, 2] in the order of the slots, on all ranks.

    `tensors`: what `shard_batch` gave.
    """
    if mesh.degrees.cp == 1:
        return scores_BQ2
    gathered_BS2 = gather(scores_BQ2, 1, mesh["cp"].get_group())
    return in_slot_order(gathered_BS2, tensors["kv_rows"]) if "kv_rows" in tensors else gathered_BS2


def slot_rows(tensors: dict[str, Tensor], mesh: Mesh, job: VLMJobConfig) -> Tensor:
    """int64 [B, ranks, S / ranks]: which tokens of each slot a context-parallel rank holds."""
    p = job.parallelism
    # Ulysses splits heads, so every rank does the same work whichever tokens it starts with.
    balance = p.context_parallel_load_balance and p.context_parallel_method == "allgather"
    return rows_of_ranks(tensors["document_ids"], mesh.degrees.cp, balance)
