"""A training checkpoint as safetensors under another library's names, one tensor in memory at a time.

No model is built: names, shapes and dtypes are those of the checkpoint.
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from torchtitan.components.checkpoint_read import PREFIX, reading, stored_tensors
from torchtitan.config.errors import ConfigError
from torchtitan.layers.lora import is_adapters, merge, names_of
from torchtitan.models.hf.writing import SHARD_GB, TensorToWrite, write_folder
from torchtitan.models.weight_names import Piece, Row, to_theirs


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
        into the weights of their maps; None: they are left out.

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
        self.tensors = {name: self._made(of, dtype) for name, of in sorted(pieces.of.items())}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of what is written."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
        return max(sizes, key=lambda dtype: sizes[dtype])

    def write(self, folder: Path, shard_gb: float = SHARD_GB, rank: int = 0, ranks: int = 1) -> None:
        """Write the files of one of `ranks`; the first one writes the index too. Raises Damaged, OSError."""
        write_folder(self.tensors, folder, shard_gb, rank, ranks)

    def _made(self, pieces: list[Piece], dtype: torch.dtype | None) -> TensorToWrite:
        stored = self.stored
        read = [
            torch.empty(len(piece.rows), *stored[piece.source].shape[1:], device="meta") for piece in pieces
        ]
        shapes = [piece.transform(rows).shape for piece, rows in zip(pieces, read, strict=True)]
        shape = (sum(each[0] for each in shapes), *shapes[0][1:])
        return TensorToWrite(shape, dtype or stored[pieces[0].source].dtype, lambda: map(self._rows, pieces))

    def _rows(self, piece: Piece) -> Tensor:
        return piece.transform(self._read(piece))

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
