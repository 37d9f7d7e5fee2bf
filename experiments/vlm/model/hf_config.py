"""Sizes in the words of Hugging Face: a SigLIP tower, and the whole model as Lfm2VlConfig. Imports no torch.

    siglip2, siglip2_vision_model    NaFlex: any size of image, a table of num_patches positions
    siglip, siglip_vision_model      one size of image; SigLIP2 checkpoints of fixed size are of this class
    lfm2_vl                          our composition, with one of the decoders of models/decoder/hf_config.py

Defaults are those of the classes of transformers 5.24.
"""

import math
from typing import Any

from experiments.vlm.model.flavors import EncoderConfig, ProjectorConfig, VLMConfig
from torchtitan.config.errors import require
from torchtitan.models.decoder import hf_config as decoder
from torchtitan.models.hf.config_file import ConfigFile

WHOLE = "lfm2_vl"
NAFLEX, FIXED = "siglip2_vision_model", "siglip_vision_model"
# model_type -> that of its tower, where the tower is a section
TOWERS = {"siglip2": NAFLEX, "siglip": FIXED, WHOLE: NAFLEX, NAFLEX: None, FIXED: None}


def encoder_config(file: ConfigFile) -> EncoderConfig:
    """A tower's sizes, or those of a larger model's tower. Raises ConfigError for what the encoder is not."""
    kind = file.model_type
    require(
        kind in TOWERS,
        f"{file.where}: model_type = {kind!r}: no encoder of that kind here; known: {', '.join(TOWERS)}",
    )
    if inside := TOWERS[kind]:
        file = file.section("vision_config")
        kind = file.model_type or inside
        require(
            kind in (NAFLEX, FIXED),
            f"{file.where}: model_type = {kind!r}: no encoder of that kind here; known: {NAFLEX}, {FIXED}",
        )
    file.refuse_all_but("hidden_act", "gelu_pytorch_tanh")
    file.refuse_all_but("num_channels", 3)
    patch_size = file.size("patch_size", 16)
    image_size = file.size("image_size", 224) if kind == FIXED else None
    places = file.size("num_patches", 256)
    grid = math.isqrt(places) if image_size is None else image_size // patch_size
    square = f"{file.where}: num_patches = {places}: must be a square, since positions form a square table"
    require(image_size is not None or grid**2 == places, square)
    dim, heads = file.size("hidden_size", 768), file.size("num_attention_heads", 12)
    require(dim % heads == 0, f"{file.where}: {heads} heads do not divide hidden_size = {dim}")
    return EncoderConfig(
        dim,
        file.size("num_hidden_layers", 12),
        heads,
        file.size("intermediate_size", 3072),
        patch_size,
        grid,
        file.get("layer_norm_eps", 1e-6),
        image_size,
    )


def decoder_config(file: ConfigFile) -> decoder.DecoderConfig:
    """Sizes of a causal language model, or of the one inside the whole model. Raises ConfigError."""
    if file.model_type != WHOLE:
        return decoder.decoder_config(file)
    text = file.section("text_config")
    for place, key in ((file, "tie_word_embeddings"), (file, "tie_embedding"), (text, "tie_word_embeddings")):
        if place.values.get(key) is not None:
            return decoder.decoder_config(text, place.get(key, True))
    return decoder.decoder_config(text, True)


def projector_config(file: ConfigFile) -> ProjectorConfig:
    """Sizes of the projector inside the whole model. Raises ConfigError."""
    file.refuse_all_but("projector_hidden_act", "gelu")
    file.refuse_all_but("projector_bias", True)
    return ProjectorConfig(
        file.size("projector_hidden_size", 2560),
        file.get("projector_use_layernorm", True),
        file.size("downsample_factor", 2),
    )


def vlm_config(file: ConfigFile) -> VLMConfig:
    """Sizes of a whole model. Raises ConfigError."""
    return VLMConfig(encoder_config(file), projector_config(file), decoder_config(file))


def encoder_hf_config(config: EncoderConfig, fixed: bool) -> dict[str, Any]:
    """config.json of the tower without its pooling head. `fixed`: as the class of one image size."""
    size = {"image_size": config.image_size} if fixed else {"num_patches": config.position_grid**2}
    return {
        "model_type": FIXED if fixed else NAFLEX,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "patch_size": config.patch_size,
        **size,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": config.norm_eps,
        "vision_use_head": False,
    }


def vlm_hf_config(config: VLMConfig, vocab_size: int, image_token_id: int) -> dict[str, Any]:
    """config.json of the whole model. `vocab_size`: rows of the embedding, padding rows included."""
    return {
        "model_type": WHOLE,
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "vision_config": encoder_hf_config(config.encoder, fixed=False),
        "text_config": decoder.hf_config(config.decoder, vocab_size),
        "image_token_id": image_token_id,
        "downsample_factor": config.projector.merge_size,
        "projector_hidden_size": config.projector.hidden_dim,
        "projector_use_layernorm": config.projector.layer_norm,
        "projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": config.decoder.tied_embeddings,
    }
