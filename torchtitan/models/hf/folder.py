"""The weights of a folder: one file, several with an index, or several without. Imports no torch."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torchtitan.config.errors import ConfigError, require
from torchtitan.models.hf.safetensors_file import StoredTensor, read_header
from torchtitan.tools.hub import get_it

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The same weights again under other names, and what is no model of its own.
OTHERS = re.compile(r"(consolidated.*|adapter_model)\.safetensors")


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by name, from the headers of its files.

    Raises ConfigError where there are none, one is missing, damaged or there twice, or where files and index
    do not agree.
    """
    require(folder.is_dir(), f"{folder}: no such folder (looked from {Path.cwd()}); {get_it(folder)}")
    index = folder / INDEX
    if index.is_file():
        return _indexed(index, read_index(index))
    files = sorted(path for path in folder.glob("*.safetensors") if not OTHERS.fullmatch(path.name))
    require(bool(files), _nothing(folder))
    _require_all_shards(folder, files)
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in read_header(path).items():
            require(
                name not in tensors, f"tensor {name} is in {tensors.get(name, tensor).file} and in {path}"
            )
            tensors[name] = tensor
    return tensors


def _nothing(folder: Path) -> str:
    """The error for a folder without safetensors."""
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not pickles:
        return f"{folder}: holds no *.safetensors; {get_it(folder)}"
    how = f"torchtitan-vlm from_torch --torch {folder} --out OTHER"
    return (
        f"{folder}/{pickles[0]}: a pickle can run code when it is opened, and no part of it can be read "
        f"alone, so only safetensors are taken: fetch those, or make them of its tensors: {how}"
    )


def _require_all_shards(folder: Path, files: list[Path]) -> None:
    for path in files:
        if match := SHARD.fullmatch(path.name):
            stem, _, count = match.groups()
            for number in range(1, int(count) + 1):
                shard = folder / f"{stem}-{number:05d}-of-{count}.safetensors"
                require(
                    shard.is_file(),
                    f"{shard}: is missing, and {path.name} says that there are {int(count)}; {get_it(shard)}",
                )


def read_index(index: Path) -> Mapping[str, str]:
    """Tensor -> name of its file."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        good = all(isinstance(text, str) and Path(text).name == text for text in names.values())
    except OSError as error:
        raise ConfigError(f"{index}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    require(good, f"{index}: is damaged: expected weight_map, a table of tensors and their files")
    return names


def _indexed(index: Path, names: Mapping[str, str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(names.values())):
        path = index.parent / file
        first = next(name for name, its_file in names.items() if its_file == file)
        says = f"{INDEX} says that tensor {first} is in it"
        require(path.is_file(), f"{path}: is missing; {says}; {get_it(path)}")
        for name, tensor in read_header(path).items():
            where = names.get(name)
            other = f"{index} does not name it" if where is None else f"{INDEX} says that it is in {where}"
            require(where == file, f"{tensor}: {other}")
            tensors[name] = tensor
    for name, file in names.items():
        require(name in tensors, f"tensor {name} is not in {index.parent / file}, though {INDEX} says so")
    return tensors
