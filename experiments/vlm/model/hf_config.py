"""Sizes in the words of Hugging Face: the whole model as Lfm2VlConfig. Imports no torch.

    lfm2_vl    our composition: a SigLIP2 tower, and one of the decoders of models/decoder/hf_config.py

Towers alone are read and written in towers/. Defaults are those of the classes of transformers 5.24.
"""

from dataclasses import replace
from typing import Any

from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.towers import FIXED, NAFLEX, model_type_of, read_encoder, write_encoder
from torchtitan.config.errors import require
from torchtitan.models.decoder import hf_config as decoder
from torchtitan.models.hf.config_file import ConfigFile

WHOLE = "lfm2_vl"


def encoder_config(file: ConfigFile) -> EncoderConfig:
    """A tower's sizes, or those of a larger model's tower. Raises ConfigError for what the encoder is not."""
    if file.model_type != WHOLE:
        return read_encoder(file)
    section = file.section("vision_config")
    named = {"model_type": NAFLEX} | {k: v for k, v in section.values.items() if v is not None}
    return read_encoder(ConfigFile(named, section.where), among=(NAFLEX, FIXED))


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


def require_lfm2_vl(config: VLMConfig) -> None:
    """Raises ConfigError where Lfm2VlForConditionalGeneration does not compute what the model does."""
    kind, plain = model_type_of(config.encoder), ProjectorConfig(config.projector.hidden_dim)
    parts = "export its parts alone (--part)"
    siglip = f"no class of transformers has a {kind} as the encoder of a model like this: {parts}"
    require(kind in (NAFLEX, FIXED), siglip)
    other = replace(config.projector, layer_norm=plain.layer_norm, merge_size=plain.merge_size) != plain
    require(not other, f"no class of transformers has a projector like this one: {parts}")


def vlm_hf_config(config: VLMConfig, vocab_size: int, image_token_id: int) -> dict[str, Any]:
    """config.json of the whole model. `vocab_size`: rows of the embedding, padding rows included."""
    return {
        "model_type": WHOLE,
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "vision_config": write_encoder(config.encoder, NAFLEX),
        "text_config": decoder.hf_config(config.decoder, vocab_size),
        "image_token_id": image_token_id,
        "downsample_factor": config.projector.merge_size,
        "projector_hidden_size": config.projector.hidden_dim,
        "projector_use_layernorm": config.projector.layer_norm,
        "projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": config.decoder.tied_embeddings,
    }
