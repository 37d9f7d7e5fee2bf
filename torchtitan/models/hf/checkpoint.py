"""Weights of folders as a training checkpoint, in the dtypes of their files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.components.checkpoint_folder import RECORD
from torchtitan.components.checkpoint_read import PREFIX, reason
from torchtitan.config.errors import CheckpointError
from torchtitan.models.hf.source import FolderSource
from torchtitan.models.hf.tensors import FLOATS, Assembly, Rows, shape_of
from torchtitan.tools.disk import free


def write_checkpoint(
    source: FolderSource, fresh: Mapping[str, Tensor], model: Mapping[str, Any], folder: Path
) -> None:
    """Write a checkpoint into `folder`. `fresh`: weights that no folder has; `model`: its sizes.

    What is stored as it lies in a file is mapped rather than read, so memory holds one tensor at a time.
    Raises CheckpointError where the disk does not take it.
    """
    weights = {name: _mapped(made) for name, made in source.made.items()} | dict(fresh)
    state = {PREFIX + name: tensor for name, tensor in weights.items()}
    record = {"step": 0, "tokens": 0, "model_only": True, "model": dict(model)}
    (folder / RECORD).write_text(json.dumps(record, indent=1))
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(str(folder)), no_dist=True)
    except CheckpointException as error:
        told = f"the checkpoint was not written ({reason(error)}; {free(folder)} free): make room"
        raise CheckpointError(told) from None


def _mapped(made: Assembly) -> Tensor:
    first = made[0]
    assert isinstance(first, Rows)
    stored, shape, dtype = first.stored, shape_of(made), FLOATS[first.stored.dtype]
    if len(made) == 1 and len(first) == stored.shape[0] and shape == stored.shape:
        raw = np.memmap(stored.file, np.uint8, "c", stored.begin, (len(first) * stored.row_bytes,))
        return torch.from_numpy(raw).view(dtype).view(shape)
    whole, done = torch.empty(shape, dtype=dtype), 0
    for piece in made:
        for rows in piece.read(0, len(piece)):
            whole[done : done + len(rows)].copy_(rows)
            done += len(rows)
    return whole
