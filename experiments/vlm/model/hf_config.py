"""Sizes in the words of Hugging Face, of whole models (families/) and of their parts alone. Imports no torch.

Towers are read and written in towers/, decoders in models/decoder/hf_config.py. Defaults are those of the
classes of transformers 5.24.
"""

from typing import Any

from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.families import FAMILIES, family_of
from experiments.vlm.model.towers import read_encoder
from torchtitan.models.decoder import hf_config as decoder
from torchtitan.models.hf.config_file import ConfigFile


def encoder_config(file: ConfigFile) -> EncoderConfig:
    """A tower's sizes, or those of a larger model's tower. Raises ConfigError for what the encoder is not."""
    family = FAMILIES.get(file.model_type)
    return family.encoder(file) if family else read_encoder(file)


def decoder_config(file: ConfigFile) -> decoder.DecoderConfig:
    """Sizes of a causal language model, or of the one inside a whole model. Raises ConfigError."""
    family = FAMILIES.get(file.model_type)
    return family.decoder(file) if family else decoder.decoder_config(file)


def projector_config(file: ConfigFile) -> ProjectorConfig:
    """Sizes of the projector inside a whole model. Raises ConfigError."""
    return FAMILIES[file.model_type].projector(file)


def vlm_config(file: ConfigFile) -> VLMConfig:
    """Sizes of a whole model. Raises ConfigError."""
    parts = encoder_config(file), projector_config(file), decoder_config(file)
    return VLMConfig(*parts, family=file.model_type)


def vlm_hf_config(config: VLMConfig, vocab_size: int, image_token_id: int) -> dict[str, Any]:
    """config.json of a whole model. `vocab_size`: rows of the embedding, padding rows included."""
    return family_of(config).write(config, vocab_size, image_token_id)
