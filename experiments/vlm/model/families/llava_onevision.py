"""LLaVA-OneVision (Li et al., 2024) as LlavaOnevisionForConditionalGeneration: SigLIP without its last layer,
two linear maps and a Qwen2. An image alone is cut into tiles, whose tokens are resized to about those of
nine; each of several is a square. Videos are not supported.
"""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, TilesConfig, VLMConfig
from experiments.vlm.model.families.llava import FAMILY as LLAVA
from experiments.vlm.model.families.llava import KEEPS_CLASS
from experiments.vlm.model.families.llava import decoder_config as read_decoder
from experiments.vlm.model.families.llava import encoder_config as read_tower
from experiments.vlm.model.families.llava import write as write_llava
from experiments.vlm.model.families.tiled import (
    PARTS,
    image_processor,
    pinpoints,
    projector_config,
    read_tiles,
    require_tiled,
)
from experiments.vlm.model.towers import FIXED, TOWERS
from torchtitan.config.errors import require
from torchtitan.models.decoder.flavors import DECODERS
from torchtitan.models.hf.config_file import ConfigFile

TILES = TilesConfig(tuple(itertools.product(range(1, 7), repeat=2)), most=9, alone=True)
SIGLIP = replace(TOWERS[FIXED].sizes["siglip-so400m"], layers=26, feature_norm=False)
LIMIT = "anyres_max_"


def encoder_config(file: ConfigFile) -> EncoderConfig:
    """The tower, and which of its layers are read."""
    return read_tower(file, SIGLIP, -1, KEEPS_CLASS)


def tiles(folder: Path, file: ConfigFile, encoder: EncoderConfig) -> TilesConfig:
    """How an image is cut, and to how many tiles' tokens it is resized."""
    ratio = file.get("vision_aspect_ratio", f"{LIMIT}{TILES.most}")
    limit = re.fullmatch(LIMIT + r"([1-9]\d*)", ratio)
    require(
        limit is not None, f"{file.where}: vision_aspect_ratio = {ratio!r}: not supported here, only {LIMIT}N"
    )
    default = replace(TILES, most=int(ratio.removeprefix(LIMIT)))
    return read_tiles(folder, file, encoder, default, 384, crops=False)


def require_onevision(config: VLMConfig) -> None:
    """Raises ConfigError where its class does not compute what the model does."""
    require(not config.encoder.extra_cells, f"OneVision has no tower with a class token: {PARTS}")
    require_tiled(config, TILES)


def write(config: VLMConfig, vocab_size: int, image_token_id: int) -> dict[str, Any]:
    """config.json. `vocab_size`: rows of the embedding, padding rows included."""
    return write_llava(config, vocab_size, image_token_id) | {
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_grid_pinpoints": pinpoints(config),
        "vision_aspect_ratio": f"{LIMIT}{config.tiles.most}",
    }


def processor(config: VLMConfig, plan: ImagePlan) -> dict[str, Any]:
    """LlavaOnevisionProcessor of a plan. Raises ConfigError for one without tiles."""
    images = image_processor(config, plan, "LlavaOnevisionImageProcessor")
    kept = {key: value for key, value in images.items() if key not in ("crop_size", "do_center_crop")}
    frames = {key: value for key, value in kept.items() if key not in ("do_pad", "image_grid_pinpoints")}
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "image_processor": kept,
        "video_processor": {
            **{key: value for key, value in frames.items() if key != "image_processor_type"},
            "video_processor_type": "LlavaOnevisionVideoProcessor",
        },
        "num_image_tokens": (plan.side // plan.patch_size) ** 2,
        "vision_feature_select_strategy": KEEPS_CLASS,
        "vision_aspect_ratio": f"{LIMIT}{config.tiles.most}",
    }


def _onevision(qwen: str, rows: int) -> VLMConfig:
    sizes = replace(DECODERS[qwen], vocab_size=rows)  # those of Qwen2 are those of Qwen2.5
    projector = ProjectorConfig(sizes.dim, False, 1, newline=True)
    return VLMConfig(SIGLIP, projector, sizes, "llava_onevision", "tiles", TILES)


FAMILY = replace(
    LLAVA,
    encoder=encoder_config,
    projector=projector_config,
    decoder=lambda file: read_decoder(file, "qwen2"),
    resize=lambda folder, encoder: "tiles",
    tiles=tiles,
    require=require_onevision,
    write=write,
    processor=processor,
    newline=("image_newline", "model.image_newline"),
    sizes={
        "llava-onevision-0.5b": _onevision("qwen2.5-0.5B", 152000),
        "llava-onevision-7b": _onevision("qwen2.5-7B", 152128),
    },
)
