"""AIMv2 (Fini et al., 2024): RMSNorm, a gated MLP, no biases but that of the patches.

The native models add sines and cosines of row and column; those of one size of image have a learned table.
"""

from typing import Any

from experiments.vlm.model.config import EncoderConfig
from experiments.vlm.model.towers.clip import KIND as CLIP
from experiments.vlm.model.towers.clip import LEFT_OVER as LEFT_BY_CLIP
from experiments.vlm.model.towers.tower import Tower, activation, kernel, widths, write_widths
from torchtitan.config.errors import require
from torchtitan.models.hf.config_file import ConfigFile
from torchtitan.models.weight_names import Row

KIND: dict[str, Any] = {
    "model_type": "aimv2_vision_model",
    "mean": CLIP["mean"],
    "deviation": CLIP["deviation"],
    "resample": "bicubic",
    "embedding_norm": "patches",
    "norm": "rms",
    "gated_mlp": True,
}
# Values of the published ones; others are read too.
PLAIN: dict[str, Any] = {"attention_biases": "", "mlp_bias": False, "activation": "silu"}
OWN = [
    Row("embeddings.rms_norm.weight", "embedding.norm.weight"),
    Row("embeddings.position_embedding.weight", "embedding.positions.weight"),
    Row("encoder.layers.*.rms_norm1.weight", "layers.*.attention_norm.weight"),
    Row("encoder.layers.*.attention.q_proj.*", "layers.*.attention.wq.*"),
    Row("encoder.layers.*.attention.k_proj.*", "layers.*.attention.wk.*"),
    Row("encoder.layers.*.attention.v_proj.*", "layers.*.attention.wv.*"),
    Row("encoder.layers.*.attention.out_proj.*", "layers.*.attention.wo.*"),
    Row("encoder.layers.*.rms_norm2.weight", "layers.*.mlp_norm.weight"),
    Row("encoder.layers.*.ffn.gate_proj.*", "layers.*.mlp.gate.*"),
    Row("encoder.layers.*.ffn.up_proj.*", "layers.*.mlp.fc1.*"),
    Row("encoder.layers.*.ffn.down_proj.*", "layers.*.mlp.fc2.*"),
    Row("rms_norm.weight", "norm.weight"),
]
LEFT_OVER = LEFT_BY_CLIP | {r"head\..*": "of the pooling head: a VLM reads the patches"}


def read(file: ConfigFile) -> EncoderConfig:
    """Sizes of an Aimv2VisionModel."""
    sizes, patch_size = widths(file, 1024, 24, 8, 2816), file.size("patch_size", 14)
    native, image_size = file.get("is_native", False), file.size("image_size", 224)
    kind = KIND | {
        "positions": "waves" if native else "table",
        "attention_biases": "qkvo" if file.get("qkv_bias", False) else "",
        "mlp_bias": file.get("mlp_bias", False),
        "activation": activation(file, "silu"),
    }
    quarters = f"{file.where}: hidden_size = {sizes[0]}: must be a multiple of 4, for positions as waves"
    require(not native or sizes[0] % 4 == 0, quarters)
    eps = file.get("rms_norm_eps", 1e-5)
    return EncoderConfig(*sizes, patch_size, image_size // patch_size, eps, image_size, **kind)


def write(config: EncoderConfig) -> dict[str, Any]:
    """config.json of an Aimv2VisionModel without its pooling head."""
    return write_widths(config) | {
        "image_size": config.image_size or config.position_grid * config.patch_size,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "qkv_bias": bool(config.attention_biases),
        "mlp_bias": config.mlp_bias,
        "is_native": config.positions == "waves",
        "use_head": False,
    }


def rows(config: EncoderConfig) -> list[Row]:
    """The MLP's gate is the map that goes through the activation."""
    return kernel("embeddings.patch_embed", config.patch_size) + OWN


TOWER = Tower(
    "Aimv2VisionModel",
    read,
    write,
    rows,
    LEFT_OVER,
    inside=("aimv2",),
    sizes={
        # apple/aimv2-large-patch14-native
        "aimv2-L": EncoderConfig(1024, 24, 8, 2816, 14, 16, 1e-5, 224, **KIND, **PLAIN, positions="waves"),
    },
)
