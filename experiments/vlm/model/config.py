"""Sizes and kinds of a vision-language model, part by part. Imports no torch.

What differs between families of encoders is a switch here; vit.py computes it, and each file of towers/ has
the values of a family.
"""

from dataclasses import dataclass
from typing import Literal

from torchtitan.models.decoder.flavors import DecoderConfig

Activation = Literal["gelu_pytorch_tanh", "gelu", "quick_gelu", "silu"]  # names of transformers
Resample = Literal["bilinear", "bicubic"]  # both antialiased


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and kinds of one encoder. A row gives what differs from SigLIP2."""

    dim: int
    layers: int
    heads: int
    mlp_dim: int
    patch_size: int = 16
    position_grid: int = 16  # learned positions form a square table of this side, resized to each image
    norm_eps: float = 1e-6
    image_size: int | None = None  # pixels a side that its class takes, where that is one size; None: any
    # its class in transformers (towers/); empty: SigLIP2's, or SigLIP's where image_size is given
    model_type: str = ""
    # of red, green and blue: pixels between 0 and 1, minus the mean, over the deviation
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: Resample = "bilinear"  # kernel that resizes its images
    patch_bias: bool = True
    # learned, in a table; sine and cosine of row and column; or turning queries and keys in every layer
    positions: Literal["table", "waves", "rotary"] = "table"
    rotary_theta: float = 100.0  # the longest wave is about so many times the side of an image
    # a norm behind the embedding: over patches before they get positions, or over all that the first layer
    # reads
    embedding_norm: Literal["none", "patches", "all"] = "none"
    class_token: bool = False  # with a position of its own, where positions are a table
    registers: int = 0
    mask_token: bool = False  # kept for export alone: images are masked in its own training
    norm: Literal["layer", "rms"] = "layer"
    attention_biases: str = "qkvo"  # which of the four maps have one
    mlp_bias: bool = True
    activation: Activation = "gelu_pytorch_tanh"
    gated_mlp: bool = False
    layer_scale: bool = False  # a learned factor for each channel that attention and MLP add
    # The features that are read: the stream after so many layers, counted from the end where negative (-1:
    # after all, -2: all but one), several side by side. Layers behind the last of these are kept, and do not
    # run.
    feature_layers: tuple[int, ...] = (-1,)
    feature_norm: bool = True  # features go through the last norm
    feature_extra: bool = False  # class token and registers become visual tokens too

    @property
    def extra_cells(self) -> int:
        """Cells of an image besides its patches: class token and registers."""
        return self.class_token + self.registers

    @property
    def feature_depths(self) -> tuple[int, ...]:
        """After how many layers each feature is read."""
        return tuple(depth if depth >= 0 else self.layers + 1 + depth for depth in self.feature_layers)

    @property
    def feature_dim(self) -> int:
        """Width of the features of a patch."""
        return self.dim * len(self.feature_layers)


@dataclass(frozen=True)
class ProjectorConfig:
    """Sizes and kinds of the projector; its input is as wide as merge_size^2 patches."""

    hidden_dim: int
    layer_norm: bool = True
    merge_size: int = 2  # m: m * m patches become one visual token; 1: each becomes one
    norm_first: bool = False  # over each patch, before they merge
    norm_eps: float = 1e-5
    linears: int = 2  # at least 1, with the activation between
    activation: Activation = "gelu"
    bias: bool = True
    newline: bool = False  # one more vector, learned, for the end of a row of tiles


@dataclass(frozen=True)
class TilesConfig:
    """How an image is cut into tiles, where it is (data/tiles.py)."""

    # (rows, columns) to choose from; those of LLaVA-NeXT
    grids: tuple[tuple[int, ...], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    most: int | None = None  # joined tiles are resized to about the tokens of so many; None: never
    alone: bool = False  # only where an image is the only one of its document; else each is padded


@dataclass(frozen=True)
class VLMConfig:
    """Sizes of a whole model, part by part."""

    encoder: EncoderConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    family: str = "lfm2_vl"  # its class in transformers (families/)
    resize: str = "native"  # its image plan (data/image_plan.py), where data.resize is unset
    tiles: TilesConfig = TilesConfig()
