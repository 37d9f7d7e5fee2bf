"""Sizes of vision-language models: every SigLIP2 encoder with every decoder. Imports no torch.

A flavor is named ENCODER-DECODER, for example `so400m-llama3.2-1B`; `debugmodel` trains on two CPU cores.
Sources: config.json of google/siglip2-*-naflex; SigLIP 2 (Tschannen et al., 2025).
"""

from dataclasses import dataclass

from torchtitan.models.decoder.flavors import DECODERS, DecoderConfig


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of one SigLIP encoder."""

    dim: int
    layers: int
    heads: int
    mlp_dim: int
    patch_size: int = 16
    position_grid: int = 16  # learned positions form a square table of this side, resized to each image
    norm_eps: float = 1e-6
    image_size: int | None = None  # pixels a side that its class takes, where that is one size; None: NaFlex


@dataclass(frozen=True)
class ProjectorConfig:
    """Sizes of the projector; its input is as wide as merge_size^2 patches."""

    hidden_dim: int
    layer_norm: bool = True
    merge_size: int = 2  # m: m * m patches become one visual token


@dataclass(frozen=True)
class VLMConfig:
    """Sizes of a whole model, part by part."""

    encoder: EncoderConfig
    projector: ProjectorConfig
    decoder: DecoderConfig


ENCODERS = {
    "base": EncoderConfig(768, 12, 12, 3072),
    "large": EncoderConfig(1024, 24, 16, 4096),
    "so400m": EncoderConfig(1152, 27, 16, 4304),
    "giant": EncoderConfig(1536, 40, 16, 6144),
}

FLAVORS = {
    "debugmodel": VLMConfig(EncoderConfig(128, 4, 4, 512), ProjectorConfig(256), DECODERS["debug"])
} | {
    f"{encoder}-{decoder}": VLMConfig(
        ENCODERS[encoder], ProjectorConfig(DECODERS[decoder].dim), DECODERS[decoder]
    )
    for encoder in ENCODERS
    for decoder in DECODERS
    if decoder != "debug"
}
