"""SigLIP2 of any size of image (NaFlex), and SigLIP of one size, whose class the SigLIP2 checkpoints of fixed
size have too. Zhai et al., 2023; Tschannen et al., 2025.

One tower: positions that were learned for one size are resized to each image as those of NaFlex are.
"""

import math
from typing import Any

from experiments.vlm.model.config import EncoderConfig, Resample
from experiments.vlm.model.towers.tower import Tower, kernel, widths, write_widths
from torchtitan.config.errors import require
from torchtitan.models.hf.config_file import ConfigFile
from torchtitan.models.weight_names import Row

ACTIVATION = "gelu_pytorch_tanh"
BLOCKS = [
    Row("embeddings.position_embedding.weight", "embedding.positions.weight"),
    Row("encoder.layers.*.layer_norm1.*", "layers.*.attention_norm.*"),
    Row("encoder.layers.*.self_attn.q_proj.*", "layers.*.attention.wq.*"),
    Row("encoder.layers.*.self_attn.k_proj.*", "layers.*.attention.wk.*"),
    Row("encoder.layers.*.self_attn.v_proj.*", "layers.*.attention.wv.*"),
    Row("encoder.layers.*.self_attn.out_proj.*", "layers.*.attention.wo.*"),
    Row("encoder.layers.*.layer_norm2.*", "layers.*.mlp_norm.*"),
    Row("encoder.layers.*.mlp.fc1.*", "layers.*.mlp.fc1.*"),
    Row("encoder.layers.*.mlp.fc2.*", "layers.*.mlp.fc2.*"),
    Row("post_layernorm.*", "norm.*"),
]
LEFT_OVER = {
    r"head\..*": "of the pooling head: a VLM reads the patches",
    r"text_model\..*": "of the text tower, in whose place the decoder stands",
    r"logit_(scale|bias)": "of the contrastive loss",
    r".*\.position_ids": "position_ids, which are computed",
}


def read_naflex(file: ConfigFile) -> EncoderConfig:
    """A table of num_patches positions."""
    places = file.size("num_patches", 256)
    square = f"{file.where}: num_patches = {places}: must be a square, since positions form a square table"
    require(math.isqrt(places) ** 2 == places, square)
    return _read(file, file.size("patch_size", 16), math.isqrt(places), None)


def read_fixed(file: ConfigFile) -> EncoderConfig:
    """A table of as many positions as its images have patches; what is left at the edges is not read."""
    patch_size, image_size = file.size("patch_size", 16), file.size("image_size", 224)
    return _read(file, patch_size, image_size // patch_size, image_size)


def _read(file: ConfigFile, patch_size: int, grid: int, image_size: int | None) -> EncoderConfig:
    file.refuse_all_but("hidden_act", ACTIVATION)
    sizes = widths(file, 768, 12, 12, 3072)
    resample: Resample = "bicubic" if image_size else "bilinear"
    eps = file.get("layer_norm_eps", 1e-6)
    return EncoderConfig(*sizes, patch_size, grid, eps, image_size, resample=resample)


def write_naflex(config: EncoderConfig) -> dict[str, Any]:
    """Without the pooling head."""
    return _write(config) | {"num_patches": config.position_grid**2}


def write_fixed(config: EncoderConfig) -> dict[str, Any]:
    """Without the pooling head."""
    return _write(config) | {"image_size": config.image_size}


def _write(config: EncoderConfig) -> dict[str, Any]:
    kept = {"hidden_act": ACTIVATION, "layer_norm_eps": config.norm_eps, "vision_use_head": False}
    return write_widths(config) | kept


NAFLEX = Tower(
    "Siglip2VisionModel",
    read_naflex,
    write_naflex,
    lambda config: kernel("embeddings.patch_embedding", None) + BLOCKS,
    LEFT_OVER,
    inside=("siglip2",),
    sizes={
        "base": EncoderConfig(768, 12, 12, 3072),
        "large": EncoderConfig(1024, 24, 16, 4096),
        "so400m": EncoderConfig(1152, 27, 16, 4304),
        "giant": EncoderConfig(1536, 40, 16, 6144),
    },
)
FIXED = Tower(
    "SiglipVisionModel",
    read_fixed,
    write_fixed,
    lambda config: kernel("embeddings.patch_embedding", config.patch_size) + BLOCKS,
    LEFT_OVER,
    inside=("siglip",),
    sizes={
        # google/siglip-so400m-patch14-384
        "siglip-so400m": EncoderConfig(1152, 27, 16, 4304, 14, 27, image_size=384, resample="bicubic"),
    },
)
