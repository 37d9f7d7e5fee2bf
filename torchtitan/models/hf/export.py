"""A training checkpoint as safetensors under another library's names, one tensor in memory at a time.

No model is built: names, shapes and dtypes are those of the checkpoint. Several ranks may write files of one
folder beside each other.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from torchtitan.components.checkpoint_read import PREFIX, Stored, reading, stored_tensors
from torchtitan.config.errors import ConfigError
from torchtitan.layers.lora import is_adapters, merge, names_of
from torchtitan.models.hf.folder import INDEX
from torchtitan.models.hf.safetensors_file import header_bytes
from torchtitan.models.hf.tensors import NAMES
from torchtitan.models.weight_names import Piece, Row, to_theirs

GB = 10**9
SHARD_GB = 5.0  # of a file, as transformers has it


@dataclass(frozen=True)
class Made:
    """A tensor to be written: what of ours it is made of."""

    pieces: list[Piece]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Export:
    """Weights of a checkpoint whose names begin with one of `parts`, under their names."""

    def __init__(
        self,
        checkpoint: Path,
        parts: tuple[str, ...],
        rows: list[Row],
        dtype: torch.dtype | None = None,
        lora_scale: float | None = None,
    ):
        """`dtype`: of what is written; None: as it is stored. `lora_scale`: of adapters, which are merged
        into the weights that they stand beside; None: they are left out.

        Raises Damaged, and ConfigError where the checkpoint lacks a part.
        """
        self.checkpoint, self.lora_scale = checkpoint, lora_scale
        stored = {
            n.removeprefix(PREFIX): t for n, t in stored_tensors(checkpoint).items() if n.startswith(PREFIX)
        }
        own = {name: tensor for name, tensor in stored.items() if name.partition(".")[0] in parts}
        self.adapters = {name: tensor for name, tensor in own.items() if is_adapters(name)}
        self.stored = {name: tensor for name, tensor in own.items() if name not in self.adapters}
        for part in parts:
            if not any(name.startswith(part + ".") for name in self.stored):
                raise ConfigError(f"checkpoint {checkpoint} has no {part}")
        try:
            pieces = to_theirs({name: tensor.shape[0] for name, tensor in self.stored.items()}, rows)
        except ValueError as error:
            raise ConfigError(f"checkpoint {checkpoint}: {error}") from None
        self.tensors = {name: _made(of, self.stored, dtype) for name, of in sorted(pieces.of.items())}

    @property
    def dtype(self) -> torch.dtype:
        """Of most of what is written."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
        return max(sizes, key=lambda dtype: sizes[dtype])

    def write(self, folder: Path, shard_gb: float = SHARD_GB, rank: int = 0, ranks: int = 1) -> None:
        """The files of one of `ranks`; the first one writes the index too. Raises Damaged, OSError."""
        files = list(self.files(shard_gb))
        names = ["model.safetensors"] if len(files) == 1 else [
            f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
        ]  # fmt: skip
        for name, tensors in list(zip(names, files, strict=True))[rank::ranks]:
            self._write_file(folder / name, tensors)
        if rank == 0 and len(files) > 1:
            weight_map = {key: name for name, tensors in zip(names, files, strict=True) for key in tensors}
            sizes = {
                "total_parameters": sum(math.prod(tensor.shape) for tensor in self.tensors.values()),
                "total_size": sum(tensor.size for tensor in self.tensors.values()),
            }
            (folder / INDEX).write_text(json.dumps({"metadata": sizes, "weight_map": weight_map}, indent=2))

    def files(self, shard_gb: float) -> Iterator[dict[str, Made]]:
        """What each file holds: at most `shard_gb`, or one tensor that is larger."""
        file: dict[str, Made] = {}
        for name, tensor in self.tensors.items():
            if file and sum(made.size for made in file.values()) + tensor.size > shard_gb * GB:
                yield file
                file = {}
            file[name] = tensor
        yield file

    def _write_file(self, path: Path, tensors: Mapping[str, Made]) -> None:
        header = {name: (NAMES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
        with path.open("wb") as file:
            file.write(header_bytes(header))
            for tensor in tensors.values():
                for piece in tensor.pieces:
                    rows = piece.transform(self._read(piece)).to(tensor.dtype).contiguous()
                    file.write(memoryview(rows.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _read(self, piece: Piece) -> Tensor:
        weight, (a, b) = self._load(piece.source), names_of(piece.source)
        if self.lora_scale is not None and a in self.adapters:
            weight = merge(weight, self._load(a), self._load(b), self.lora_scale)
        return weight[piece.rows.start : piece.rows.stop]

    def _load(self, name: str) -> Tensor:
        stored = (self.stored | self.adapters)[name]
        weight = torch.empty(stored.shape, dtype=stored.dtype)
        with reading(self.checkpoint):
            dcp.load({PREFIX + name: weight}, checkpoint_id=str(self.checkpoint), no_dist=True)
        return weight


def _made(pieces: list[Piece], stored: Mapping[str, Stored], dtype: torch.dtype | None) -> Made:
    read = [torch.empty(len(piece.rows), *stored[piece.source].shape[1:], device="meta") for piece in pieces]
    shapes = [piece.transform(rows).shape for piece, rows in zip(pieces, read, strict=True)]
    shape = (sum(each[0] for each in shapes), *shapes[0][1:])
    return Made(pieces, shape, dtype or stored[pieces[0].source].dtype)
