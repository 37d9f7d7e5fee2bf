"""The ranks with the same slots, a pipeline-, context- and tensor-parallel group, whose leader reads.

What it hands out goes through gloo, from host memory to host memory, and in the order of the trainer's own
thread, so that no transfer is under way when a rank stops.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.distributed.collectives import from_all_ranks
from torchtitan.distributed.mesh import Mesh

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class SlotGroup:
    """`ranks`: of the world, that of the leader first."""

    mesh: Mesh
    ranks: tuple[int, ...]
    group: Any

    @property
    def leads(self) -> bool:
        """Whether this rank reads."""
        return self.mesh.leads

    def from_leader(self, value: T | None) -> T:
        """The leader's value, on all ranks of the group. Plain data."""
        values: list[Any] = [value]
        dist.broadcast_object_list(values, self.ranks[0], self.group, CPU)
        return values[0]

    def from_all(self, value: T) -> list[T]:
        """The values of all ranks of the group, in the order of `ranks`. Plain data."""
        return from_all_ranks(value, self.group)

    def copy_from_leader(self, tensors: Sequence[Tensor]) -> None:
        """Fill the other ranks' tensors with the leader's."""
        _wait_for(dist.broadcast(tensor, self.ranks[0], self.group, async_op=True) for tensor in tensors)

    def hand_out(self, parts: Sequence[Sequence[Tensor]]) -> None:
        """The leader's side of `receive`: `parts[i]` goes to `ranks[i]`. Returns once all of it is gone."""
        _wait_for(
            dist.isend(tensor, rank, self.group, tag)
            for rank, tensors in zip(self.ranks[1:], parts[1:], strict=True)
            for tag, tensor in enumerate(tensors)
        )

    def receive(self, parts: Sequence[Tensor]) -> None:
        """Fill tensors with what the leader hands out to this rank."""
        _wait_for(dist.irecv(tensor, self.ranks[0], self.group, tag) for tag, tensor in enumerate(parts))


def _wait_for(transfers: Iterable[dist.Work | None]) -> None:
    """All of them begin before the first is waited for."""
    for transfer in list(transfers):
        assert transfer is not None, "this rank is in the group"
        transfer.wait()


def slot_group(mesh: Mesh) -> SlotGroup | None:
    """The group of this rank; None where it holds its slots alone. Called by all ranks of the mesh."""
    if mesh.degrees.pp * mesh.degrees.cp * mesh.degrees.tp == 1:
        return None
    own = mesh.world.mesh[:, mesh.rank("dp_replicate"), mesh.rank("dp_shard")]
    ranks = tuple(own.flatten().tolist())
    return SlotGroup(mesh, ranks, dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True))
