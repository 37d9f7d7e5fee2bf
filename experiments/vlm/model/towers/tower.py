"""What a family of encoders says of itself, and what the files of several families have in common.

Imports no torch: sizes are asked for before it loads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from einops import rearrange

from experiments.vlm.model.config import Activation, EncoderConfig
from torchtitan.config.errors import require
from torchtitan.models.hf.config_file import ConfigFile
from torchtitan.models.weight_names import Row, Transform

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tower:
    """A class of transformers: its words for sizes, and its names of weights."""

    architecture: str
    read: Callable[[ConfigFile], EncoderConfig]  # of its config.json; raises ConfigError for what we have not
    write: Callable[[EncoderConfig], dict[str, Any]]  # the other way; model_type is added
    rows: Callable[[EncoderConfig], list[Row]]  # names without a prefix
    # what files have besides: pattern of a name without a prefix -> why nothing is lost by it
    left_over: Mapping[str, str] = field(default_factory=dict)
    inside: tuple[str, ...] = ()  # model_types of larger models that have it as their vision_config
    sizes: Mapping[str, EncoderConfig] = field(default_factory=dict)  # flavors


def kernel(name: str, patch_size: int | None) -> list[Row]:
    """The patch embedding, `name` there. `patch_size`: it is written as the kernel of a convolution; None: as
    a matrix. Both are read.
    """
    columns = Transform(_kernel_to_columns)
    if patch_size:
        columns = columns._replace(write=partial(_columns_to_kernel, patch_size=patch_size))
    return [
        Row(f"{name}.weight", "embedding.projection.weight", columns),
        Row(f"{name}.bias", "embedding.projection.bias"),
    ]


def _kernel_to_columns(rows: "Tensor") -> "Tensor":
    """A patch's values stand in the order (p, p, c) here."""
    return rearrange(rows, "d c ph pw -> d (ph pw c)") if rows.ndim == 4 else rows


def _columns_to_kernel(rows: "Tensor", patch_size: int) -> "Tensor":
    return rearrange(rows, "d (ph pw c) -> d c ph pw", ph=patch_size, pw=patch_size)


def widths(file: ConfigFile, dim: int, layers: int, heads: int, mlp_dim: int) -> tuple[int, int, int, int]:
    """Width, layers, heads and MLP width, by the keys that families share; given: defaults of the class."""
    file.refuse_all_but("num_channels", 3)
    dim, heads = file.size("hidden_size", dim), file.size("num_attention_heads", heads)
    require(dim % heads == 0, f"{file.where}: {heads} heads do not divide hidden_size = {dim}")
    return dim, file.size("num_hidden_layers", layers), heads, file.size("intermediate_size", mlp_dim)


def activation(file: ConfigFile, default: Activation) -> Any:
    """One that the encoder has."""
    name, known = file.get("hidden_act", str(default)), get_args(Activation)
    listed = f"{file.where}: hidden_act = {name!r}: not supported here, only {', '.join(known)}"
    require(name in known, listed)
    return name


def write_widths(config: EncoderConfig) -> dict[str, Any]:
    """What `widths` reads, and the size of a patch."""
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "num_channels": 3,
        "patch_size": config.patch_size,
    }
