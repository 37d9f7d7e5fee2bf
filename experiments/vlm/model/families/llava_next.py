"""LLaVA-NeXT (Liu et al., 2024) as LlavaNextForConditionalGeneration: the parts of LLaVA-1.5, and images as a
whole and in tiles, whose rows end in a learned newline.
"""

from dataclasses import replace
from typing import Any

from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.model.config import ProjectorConfig, TilesConfig, VLMConfig
from experiments.vlm.model.families.llava import FAMILY as LLAVA
from experiments.vlm.model.families.llava import LARGE, strategy_of
from experiments.vlm.model.families.llava import write as write_llava
from experiments.vlm.model.families.tiled import (
    image_processor,
    pinpoints,
    projector_config,
    read_tiles,
    require_tiled,
)
from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.models.decoder.hf_config import decoder_config as read_decoder
from torchtitan.models.hf.config_file import ConfigFile

TILES = TilesConfig()


def decoder_config(file: ConfigFile) -> DecoderConfig:
    """Sizes of the causal language model. Unlike in the other LLaVAs the file counts before the section."""
    text, key = file.section("text_config").of_kind("llama"), "tie_word_embeddings"
    return read_decoder(text, file.get(key, text.get(key, False)))


def write(config: VLMConfig, vocab_size: int, image_token_id: int) -> dict[str, Any]:
    """config.json. `vocab_size`: rows of the embedding, padding rows included."""
    return write_llava(config, vocab_size, image_token_id) | {
        "model_type": "llava_next",
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": pinpoints(config),
    }


def processor(config: VLMConfig, plan: ImagePlan) -> dict[str, Any]:
    """LlavaNextProcessor of a plan. Raises ConfigError for one without tiles."""
    return {
        "processor_class": "LlavaNextProcessor",
        "image_processor": image_processor(config, plan, "LlavaNextImageProcessor"),
        "patch_size": plan.patch_size,
        "vision_feature_select_strategy": strategy_of(config.encoder),
        "num_additional_image_tokens": config.encoder.extra_cells,
    }


def _next(decoder: DecoderConfig) -> VLMConfig:
    projector = ProjectorConfig(decoder.dim, False, 1, newline=True)
    return VLMConfig(LARGE, projector, decoder, "llava_next", "tiles", TILES)


MISTRAL = DecoderConfig(
    *(4096, 32, 32, 8, 128, 14336, 32064, 1000000.0),
    norm_eps=1e-5,
    context=32768,
    model_type="mistral",
)
FAMILY = replace(
    LLAVA,
    projector=projector_config,
    decoder=decoder_config,
    resize=lambda folder, encoder: "tiles",
    tiles=lambda folder, file, encoder: read_tiles(folder, file, encoder, TILES, 224, crops=True),
    require=lambda config: require_tiled(config, TILES),
    write=write,
    processor=processor,
    newline=("image_newline", "model.image_newline"),
    sizes={
        "llava-next-vicuna-7b": _next(LLAVA.sizes["llava-1.5-7b"].decoder),
        "llava-next-vicuna-13b": _next(LLAVA.sizes["llava-1.5-13b"].decoder),
        "llava-next-mistral-7b": _next(MISTRAL),
    },
)
