"""What a checkpoint holds, found without reading its tensors, and the error where it cannot be read."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchtitan.components.checkpoint_folder import Damaged, read_record
from torchtitan.config.errors import ConfigError
from torchtitan.layers.lora import is_adapters

# Commands of one process read and write checkpoints without a process group, on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

Failure = (OSError, CheckpointException)  # CheckpointException, of all ranks alike, is no Exception
CUT_SHORT = "inline_container"  # in torch's error about a file that ends too early, written or read
PREFIX = "model."  # of the weights' names
Sizes = Mapping[str, tuple[int, ...]]  # of the tensors in a checkpoint, by name


class Stored(NamedTuple):
    """A tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by name. Raises Damaged where .metadata is missing or damaged."""
    try:
        metadata = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    except Exception as error:  # it is a pickle, and damage in it may raise anything
        found = reason(error)
        raise Damaged(path, found if isinstance(error, OSError) else f".metadata: {found}") from None
    return {
        name: Stored(tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def stored_sizes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of those tensors. Raises Damaged."""
    return {name: tensor.shape for name, tensor in stored_tensors(path).items()}


def require_sizes(wanted: Sizes, stored: Sizes) -> None:
    """Raises ConfigError for a tensor that is not in the checkpoint, or there with another shape, and for
    adapters that are there and not wanted.
    """
    for name in stored:
        if name.startswith(PREFIX) and is_adapters(name) and name not in wanted:
            raise ConfigError(f"the checkpoint has an adapter {name}: give the [lora] that it was made with")
    for name, shape in wanted.items():
        if name not in stored:
            frozen = (
                "optimizer.name or training.freeze (checkpoint.exclude_from_loading optimizer: start it anew)"
            )
            of_part = frozen if name.startswith("optimizer.") else "model.flavor"
            other = "[lora]" if is_adapters(name) else of_part
            raise ConfigError(f"the checkpoint has no {name}: it was made with another {other}")
        if stored[name] != tuple(shape):
            # Weights come first, so a moment that differs alone is that of a table's few rows.
            of_table = "training.trainable_tokens (checkpoint.exclude_from_loading optimizer: start it anew)"
            of_weight = "lora.rank" if is_adapters(name) else "model.flavor, or a tokenizer of another size"
            other = of_table if name.startswith("optimizer.") else of_weight
            raise ConfigError(
                f"{name} is {list(stored[name])} in the checkpoint and {list(shape)} here: another {other}"
            )


def require_scale(path: Path, scale: float | None) -> None:
    """Raises ConfigError where adapters were trained with another alpha / rank; files that do not say it are
    taken. `scale`: what it is here; None: nothing has an adapter.
    """
    trained = read_record(path).get("lora_scale")
    if trained is not None and scale is not None and not math.isclose(trained, scale):
        raise ConfigError(
            f"lora.alpha is {scale:g} times lora.rank, but {trained:g} times in checkpoint {path}, whose "
            "adapters would compute something else: give lora.alpha as it was"
        )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong inside is raised as Damaged."""
    try:
        yield
    except Failure as error:
        raise Damaged(path, reason(error)) from None


def reason(error: BaseException) -> str:
    """The cause on the first rank that failed, in one line."""
    if isinstance(error, CheckpointException):
        error = next(exception for exception, _ in error.failures.values())
    if isinstance(error, OSError):
        return (
            f"{Path(error.filename).name}: {error.strerror}"
            if error.filename
            else error.strerror or str(error)
        )
    if isinstance(error, EOFError) or CUT_SHORT in str(error):
        return "a file was cut short"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
