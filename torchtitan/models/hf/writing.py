"""Tensors as the safetensors of a folder: made one at a time as they are written, from wherever they are.

Several ranks may write files of one folder at the same time.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchtitan.config.errors import require
from torchtitan.models.hf.folder import INDEX
from torchtitan.models.hf.safetensors_file import header_bytes
from torchtitan.models.hf.tensors import NAMES

GB = 10**9
SHARD_GB = 5.0  # of a file, as transformers has it
DTYPES = NAMES | {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to be written. `parts`: makes it, some of its rows after the others."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    tensors: Mapping[str, TensorToWrite],
    folder: Path,
    shard_gb: float = SHARD_GB,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Write the files of one of `ranks` into `folder`, which is there; the first one writes the index too.
    Raises OSError, what making a tensor raises, and ConfigError for a number that its dtype does not hold.
    """
    files = list(_files(tensors, shard_gb))
    names = ["model.safetensors"] if len(files) == 1 else [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]  # fmt: skip
    for name, held in list(zip(names, files, strict=True))[rank::ranks]:
        write_file(folder / name, held)
    if rank == 0 and len(files) > 1:
        weight_map = {key: name for name, held in zip(names, files, strict=True) for key in held}
        sizes = {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
            "total_size": sum(tensor.size for tensor in tensors.values()),
        }
        (folder / INDEX).write_text(json.dumps({"metadata": sizes, "weight_map": weight_map}, indent=2))


def _files(tensors: Mapping[str, TensorToWrite], shard_gb: float) -> Iterator[dict[str, TensorToWrite]]:
    """What each file holds: at most `shard_gb`, or one tensor that is larger."""
    file: dict[str, TensorToWrite] = {}
    for name, tensor in tensors.items():
        if file and sum(made.size for made in file.values()) + tensor.size > shard_gb * GB:
            yield file
            file = {}
        file[name] = tensor
    yield file


def write_file(path: Path, tensors: Mapping[str, TensorToWrite]) -> None:
    """Write one file of these tensors, in their order. Raises as `write_folder` does."""
    header = {name: (DTYPES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    with path.open("wb") as file:
        file.write(header_bytes(header))
        for name, tensor in tensors.items():
            for part in tensor.parts():
                rows = _cast(name, part, tensor.dtype).contiguous()
                file.write(memoryview(rows.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _cast(name: str, part: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in `dtype`. Raises ConfigError where that makes a number infinite."""
    if part.dtype == dtype:
        return part
    rows = part.to(dtype)
    lost = part[rows.isinf() & part.isfinite()]
    most, kind = lost.abs().max().item() if len(lost) else 0.0, str(dtype).removeprefix("torch.")
    require(
        not len(lost), f"tensor {name} has {most:.3g}, more than {kind} holds: bfloat16 and float32 hold it"
    )
    return rows
