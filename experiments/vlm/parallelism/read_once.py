"""In a group of ranks with the same slots, one reads and decodes, and hands out what the others use.

    tokens, labels, indices     to all of them
    pixel_values                to each rank of the first pipeline stage the patch rows that it encodes, its
                                share or all of them; to later stages none. The other rows hold zeros there

So each image is decoded once, whatever the layout; all ranks agree on one that fails; and one rank writes the
rejects. Which rank encodes a row: encoder_parallel.py.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from experiments.vlm.batch import Batch, BatchShape
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.parallelism.encoder_parallel import own_rows
from torchtitan.distributed.mesh import Mesh
from torchtitan.distributed.slot_group import SlotGroup

RowRange = tuple[int, int]  # patch rows [start, end) of a batch


class ReadOnce:
    """Called by all ranks of the group alike, from its construction on."""

    def __init__(self, group: SlotGroup, job: VLMJobConfig, shape: BatchShape):
        """shape: of a batch."""
        self.group, self.shape = group, shape
        self.runs = group.from_all(encoded_runs(job, group.mesh, shape))  # of each rank
        self.own = self.runs[group.ranks.index(torch.distributed.get_rank())]

    @property
    def leads(self) -> bool:
        """Whether this rank reads."""
        return self.group.leads

    def share(self, batches: Sequence[Batch] | None) -> list[Batch]:
        """The leader's batches on all of them; None from the others."""
        shared = self.group.from_leader(
            [Batch({}, batch.counts, batch.samples, batch.epochs) for batch in batches] if batches else None
        )
        tensors = [batch.tensors for batch in batches] if batches else [self._empty() for _ in shared]
        self.group.copy_from_leader(
            [tensor for fields in tensors for name, tensor in fields.items() if name != "pixel_values"]
        )
        pixels = [fields["pixel_values"] for fields in tensors]
        if self.leads:
            self.group.hand_out([_rows(pixels, runs) for runs in self.runs])
        else:
            self.group.receive(_rows(pixels, self.own))
        for batch, fields in zip(shared, tensors, strict=True):
            batch.tensors = fields
        return shared

    def _empty(self) -> dict[str, Tensor]:
        # Zeros that nobody writes to take no memory.
        return {
            name: torch.zeros(self.shape.of(name), dtype=getattr(torch, field.dtype))
            for name, field in self.shape.fields.items()
        }


def encoded_runs(job: VLMJobConfig, mesh: Mesh, shape: BatchShape) -> list[RowRange]:
    """The patch rows of a batch that this rank encodes."""
    if mesh.rank("pp") > 0:
        return []
    rows = torch.arange(shape.slots * shape.patch_rows)
    return list(_runs(own_rows(rows, job, mesh).tolist()))


def _runs(rows: list[int]) -> Iterator[RowRange]:
    """Neighbours together."""
    for _, run in itertools.groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0]):
        members = [row for _, row in run]
        yield members[0], members[-1] + 1


def _rows(pixels: Sequence[Tensor], runs: Sequence[RowRange]) -> list[Tensor]:
    return [tensor[start:end] for tensor in pixels for start, end in runs]
