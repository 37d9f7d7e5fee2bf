"""CLIP (Radford et al., 2021): a class token, a norm behind the embedding, and no bias of the patches.

Its feature is the second last layer without the last norm, as in LLaVA (Liu et al., 2023): the last one
serves the class token. Positions were learned for one size of image, and are resized to each image.
"""

from typing import Any

from experiments.vlm.model.config import EncoderConfig
from experiments.vlm.model.towers.siglip import BLOCKS
from experiments.vlm.model.towers.tower import Tower, activation, kernel, widths, write_widths
from torchtitan.models.hf.config_file import ConfigFile
from torchtitan.models.weight_names import Part, Row

KIND: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "deviation": (0.26862954, 0.26130258, 0.27577711),
    "resample": "bicubic",
    "patch_bias": False,
    "embedding_norm": "all",
    "class_token": True,
    "feature_layers": (-2,),
    "feature_norm": False,
}
TABLE = "embeddings.position_embedding.weight"
OWN = [
    Row("embeddings.class_embedding", "embedding.cells.class_token"),
    Row(TABLE, "embedding.cells.class_position", theirs_part=Part(0, 2, first=0, last=1)),
    Row(TABLE, "embedding.positions.weight", theirs_part=Part(1, 2, first=1)),
    Row("pre_layrnorm.*", "embedding.norm.*"),  # so spelled
]
LEFT_OVER = {
    r"text_model\..*": "of the text tower, in whose place the decoder stands",
    r"(text|visual)_projection\..*": "of the contrastive loss",
    "logit_scale": "of the contrastive loss",
    r".*\.position_ids": "position_ids, which are computed",
}


def read(file: ConfigFile) -> EncoderConfig:
    """Sizes of a CLIPVisionModel."""
    sizes, patch_size = widths(file, 768, 12, 12, 3072), file.size("patch_size", 32)
    image_size, eps = file.size("image_size", 224), file.get("layer_norm_eps", 1e-5)
    kind = KIND | {"activation": activation(file, "quick_gelu")}
    return EncoderConfig(*sizes, patch_size, image_size // patch_size, eps, image_size, **kind)


def write(config: EncoderConfig) -> dict[str, Any]:
    """config.json of a CLIPVisionModel."""
    own = {"image_size": config.image_size, "hidden_act": config.activation}
    return write_widths(config) | own | {"layer_norm_eps": config.norm_eps}


def rows(config: EncoderConfig) -> list[Row]:
    """The blocks are those of SigLIP."""
    return kernel("embeddings.patch_embedding", config.patch_size) + OWN + BLOCKS


TOWER = Tower(
    "CLIPVisionModel",
    read,
    write,
    rows,
    LEFT_OVER,
    inside=("clip",),
    sizes={
        # openai/clip-vit-large-patch14-336
        "clip-L": EncoderConfig(1024, 24, 16, 4096, 14, 24, 1e-5, 336, **KIND, activation="quick_gelu"),
    },
)
