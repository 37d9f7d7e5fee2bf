"""Folders that Megatron Energon has prepared say themselves which of their shards are trained on.

    FOLDER/.nv-meta/split.yaml (or .json)
        split_parts: {train: [shards/0.tar, "shards/{1..7}.tar"], val: [...], test: [...]}
        exclude: [shards/3.tar, shards/4.tar/KEY]       whole shards, or a sample by its key

Training reads `train`, validation `val`. A glob or a range names its files itself, so there the split does
not count. Samples that are excluded one by one are rejects, `excluded`.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml
from braceexpand import braceexpand

from experiments.vlm.data.sources.walk import FILE, Local
from experiments.vlm.data.storage.outages import remote
from experiments.vlm.data.storage.remote import file_system, is_file, open_file
from torchtitan.config.errors import ConfigError

Split = Literal["train", "validation"]
LEVELS = 3  # of folders above
FILES = ("/.nv-meta/split.yaml", "/.nv-meta/split.json")
PARTS: dict[Split, tuple[str, ...]] = {"train": ("train",), "validation": ("val", "valid", "validation")}


def of_split(files: Sequence[str], shards: Sequence[str], split: Split) -> list[str]:
    """The shards of a split as folders among `files` say, and all outside of these. Raises ConfigError."""
    roots: dict[str, str] = {}
    for name in FILES:
        for file in files:
            if file.endswith(name):
                roots.setdefault(file.removesuffix(name) + "/", file)
    outside = [shard for shard in shards if not any(shard.startswith(root) for root in roots)]
    return outside + [shard for root, file in roots.items() for shard in _shards(root, file, split)]


def of_split_above(folder: str, shards: list[str], split: Split) -> list[str]:
    """The shards of a local folder that belong to the split of a folder above it; all where none says."""
    for parent in Path(folder).absolute().parents[:LEVELS]:
        for name in FILES:
            if Local().kind(f"{parent}{name}") == FILE:
                chosen = set(_shards(f"{parent}/", f"{parent}{name}", split))
                return [shard for shard in shards if os.path.abspath(shard) in chosen]
    return shards


def excluded_keys(shard: str, folders: Sequence[str]) -> frozenset[str]:
    """Keys of samples of a shard that the folder above it excludes. For a remote shard, the search goes no
    higher than the one of `folders` that it was listed in: asking elsewhere may not be allowed.

    Raises OSError where the storage does not answer.
    """
    if "://" in shard:
        place, roots = shard, _remote_roots(shard, folders)
    else:
        place = os.path.abspath(shard)
        roots = [str(parent) for parent in Path(place).parents[: LEVELS + 1]]
    for root in roots:
        if (excluded := _excluded(root)) is not None:
            name = place.removeprefix(root).lstrip("/") + "/"
            return frozenset(one.removeprefix(name) for one in excluded if one.startswith(name))
    return frozenset()


def _remote_roots(shard: str, folders: Sequence[str]) -> list[str]:
    """The folders above a shard, from the next one up to the listed one; none where it was not listed."""
    listed = [system.unstrip_protocol(path).rstrip("/") for system, path in map(file_system, folders)]
    highest = next((folder for folder in listed if shard.startswith(folder + "/")), shard)
    parts = shard.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts) - 1, highest.count("/"), -1)]


@lru_cache(maxsize=64)
def _excluded(root: str) -> tuple[str, ...] | None:
    """What is excluded; None where the folder has no split."""
    file = next((root + name for name in FILES if is_file(root + name)), None)
    return tuple(_expanded(file, _read(file).get("exclude") or [])) if file else None


def _shards(root: str, file: str, split: Split) -> list[str]:
    split_file = _read(file)
    parts, excluded = split_file["split_parts"], set(_expanded(file, split_file.get("exclude") or []))
    part = next((name for name in PARTS[split] if name in parts), None)
    if part is None:
        raise ConfigError(f"{file}: no split {PARTS[split][0]} among {', '.join(map(str, parts))}")
    named = _expanded(file, parts[part] or [])
    shards = [name for name in named if name not in excluded]
    if not shards:
        raise ConfigError(f"{file}: split {part} has no shards")
    return [root + name for name in shards]


def _expanded(file: str, names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{file}: a list of shards is expected, not {str(names)[:100]}")
    return [each for name in names for each in braceexpand(name)]


def _read(file: str) -> dict[str, Any]:
    with remote(), open_file(file) as opened:
        data = opened.read()
    try:
        split_file = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(split_file, dict) or not isinstance(split_file.get("split_parts"), dict):
        raise ConfigError(f"{file}: no split_parts: {{train: [...], val: [...]}} in it")
    return split_file
