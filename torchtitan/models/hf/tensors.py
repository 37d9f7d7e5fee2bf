"""Our weights as rows of tensors in safetensors files, read by those who need them.

torch.distributed.checkpoint asks `FolderReader` for boxes of tensors, one for each shard of this rank. A box
is read a few rows at a time, so a rank holds no more of a file than `CHUNK`, whatever it holds of the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import ChunkStorageMetadata, Metadata, StorageReader
from torch.distributed.checkpoint.metadata import StorageMeta, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from torchtitan.models.hf.safetensors_file import StoredTensor

CHUNK = 32 * 2**20  # bytes of a file that are in memory at one time
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Rows:
    """Rows of one of our tensors: these of a stored one, transformed."""

    stored: StoredTensor
    rows: range
    transform: Callable[[Tensor], Tensor]
    whole: bool = False  # see Transform

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what it gives."""
        read = torch.empty(len(self.rows), *self.stored.shape[1:], device="meta")
        return tuple(self.transform(read).shape)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, first: int, last: int) -> Iterator[Tensor]:
        """Rows `first` to `last` of what it gives, in order, a few at a time."""
        with self.stored.file.open("rb") as file:
            if self.whole:
                yield self.transform(read_rows(self.stored, file, self.rows))[first:last]
                return
            for rows in chunks(self.stored, self.rows.start + first, self.rows.start + last):
                yield self.transform(read_rows(self.stored, file, rows))


@dataclass(frozen=True)
class Mean:
    """`count` rows that are each the mean of all rows of another piece: where a vocabulary has grown."""

    of: Rows
    count: int
    found: list[Tensor] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return self.count

    def read(self, first: int, last: int) -> Iterator[Tensor]:
        """As in Rows; float32."""
        if not self.found:
            sums = [rows.double().sum(0) for rows in self.of.read(0, len(self.of))]
            total = torch.stack(sums).sum(0)
            self.found.append((total / len(self.of)).float())
        yield self.found[0].expand(last - first, *self.found[0].shape)


Assembly = Sequence[Rows | Mean]  # a tensor of ours, in the order of its rows


def shape_of(made: Assembly) -> tuple[int, ...]:
    """Shape of one of our tensors."""
    first = made[0]
    assert isinstance(first, Rows)
    return (sum(map(len, made)), *first.shape[1:])


def chunks(stored: StoredTensor, first: int, last: int) -> Iterator[range]:
    """Its rows from `first` to `last`, about CHUNK bytes at a time."""
    step = max(1, CHUNK // max(1, stored.row_bytes))
    for start in range(first, last, step):
        yield range(start, min(start + step, last))


def read_rows(stored: StoredTensor, file: BinaryIO, rows: range) -> Tensor:
    """Rows of a tensor, in the dtype of the file."""
    whole = torch.empty(len(rows), *stored.shape[1:], dtype=FLOATS[stored.dtype])
    if whole.numel():
        stored.read_rows(file, rows, memoryview(whole.view(torch.uint8).numpy()).cast("B"))  # type: ignore[arg-type]
    return whole


class FolderReader(StorageReader):
    """For dcp.load: tensors of ours as `made` says."""

    def __init__(self, made: Mapping[str, Assembly]):
        self.made = made

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Each tensor whole, in one chunk."""
        entries: dict[str, Any] = {}
        for name, made in self.made.items():
            size = torch.Size(shape_of(made))
            whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            entries[name] = TensorStorageMetadata(TensorProperties(torch.float32), size, [whole])
        return Metadata(entries, storage_meta=StorageMeta())

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:  # type: ignore[override]
        """Read the boxes that this rank asks for."""
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            self._read(item, target)
            planner.commit_tensor(item, target)
        done: Any = torch.futures.Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, target: Tensor) -> None:
        first, *inner = item.storage_offsets
        count, *widths = item.lengths
        columns = tuple(slice(at, at + width) for at, width in zip(inner, widths, strict=True))
        done = 0
        for rows in self._rows(self.made[item.storage_index.fqn], first, first + count):
            target[done : done + len(rows)].copy_(rows[(slice(None), *columns)])
            done += len(rows)

    @staticmethod
    def _rows(made: Assembly, first: int, last: int) -> Iterator[Tensor]:
        begin = 0
        for piece in made:
            start, stop = max(first - begin, 0), min(last - begin, len(piece))
            if start < stop:
                yield from piece.read(start, stop)
            begin += len(piece)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a reader keeps nothing between reads."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing: there is nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans unchanged."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Always False: a path alone does not say what to read."""
        return False
