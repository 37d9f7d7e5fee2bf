"""Files of torch.save as tensors by name.

A pickle can run code when it is opened: these are opened with weights_only, which builds tensors, numbers,
texts and tables of them, and refuses all else. Tensors stay in the file until they are used.
"""

import argparse
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan.config.errors import ConfigError, require
from torchtitan.models.hf.folder import PICKLES, read_index
from torchtitan.models.hf.writing import DTYPES, TensorToWrite

HOW = "save its tensors alone where it comes from: torch.save({'model': STATE_DICT}, PATH)"


def open_torch(path: Path) -> dict[str, Any]:
    """What a file of torch.save holds, a table. Raises ConfigError for one that is damaged, or holds more
    than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # Megatron's options stand in its files
            # One of torch before 1.6 is no zip, and cannot be mapped.
            held = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # it is a pickle, and damage in it may raise anything
        code = "Unsupported" in str(error) or "GLOBAL" in str(error)
        wrong = "holds more than tensors, which could run code" if code else "cannot be read"
        raise ConfigError(f"{path}: {wrong}: {HOW}") from None
    require(isinstance(held, dict), f"{path}: is no table of tensors: {HOW}")
    return held


def require_kind(path: Path, name: str, tensor: Tensor) -> None:
    """Raises ConfigError for a tensor that safetensors cannot hold."""
    known = ", ".join(sorted(DTYPES.values()))
    strange = tensor.is_sparse or tensor.is_meta or tensor.dtype not in DTYPES
    kind = f"sparse {tensor.dtype}" if tensor.is_sparse else "no values" if tensor.is_meta else tensor.dtype
    require(not strange, f"{path}: {name} is of {kind}, which is no kind of weight here; known: {known}")


def read_pickles(folder: Path) -> tuple[dict[str, TensorToWrite], list[Path]]:
    """The tensors of a folder's *.bin, *.pt, *.pth or *.ckpt, of an index where there is one, and the other
    files. Raises ConfigError as open_torch does, and where there are none or a name is there twice.
    """
    index = folder / "pytorch_model.bin.index.json"
    files = sorted(path for pattern in PICKLES for path in folder.glob(pattern))
    if index.is_file():
        named = set(read_index(index).values())
        files = [folder / name for name in sorted(named)]
    require(bool(files), f"{folder}: holds no mp_rank_... and none of {', '.join(PICKLES)}")
    made: dict[str, TensorToWrite] = {}
    for path in files:
        require(path.is_file(), f"{path}: is missing, and {index.name} says that there is one")
        held = open_torch(path)
        held = held if any(isinstance(value, Tensor) for value in held.values()) else held.get("model", held)
        for name, tensor in held.items():
            if isinstance(tensor, Tensor):
                require(name not in made, f"{path}: {name} is in another file, too")
                require_kind(path, name, tensor)
                made[name] = TensorToWrite(tuple(tensor.shape), tensor.dtype, partial(list, [tensor]))
    require(bool(made), f"{files[0]}: holds no tensors by name")
    others = (*PICKLES, "*.index.json", "*.h5", "*.msgpack", "*.safetensors")
    return made, [p for p in sorted(folder.iterdir()) if p.is_file() and not any(map(p.match, others))]
