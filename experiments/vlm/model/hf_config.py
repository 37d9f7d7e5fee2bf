"""Sizes in the words of Hugging Face, of whole models (families/) and of their parts alone. Imports no torch.

Towers are read and written in towers/, decoders in models/decoder/hf_config.py. Defaults are those of the
classes of transformers 5.24.
"""

from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.families import FAMILIES, family_in, kind_of
from experiments.vlm.model.towers import read_encoder
from torchtitan.models.decoder import hf_config as decoder
from torchtitan.models.hf.config_file import ConfigFile


def encoder_config(file: ConfigFile) -> EncoderConfig:
    """A tower's sizes, or those of a larger model's tower. Raises ConfigError for what the encoder is not."""
    family = family_in(file)
    return family.encoder(file) if family else read_encoder(file)


def decoder_config(file: ConfigFile) -> decoder.DecoderConfig:
    """Sizes of a causal language model, or of the one inside a whole model. Raises ConfigError."""
    family = family_in(file)
    return family.decoder(file) if family else decoder.decoder_config(file)


def projector_config(file: ConfigFile) -> ProjectorConfig:
    """Sizes of the projector inside a whole model. Raises ConfigError."""
    return FAMILIES[kind_of(file)].projector(file)


def vlm_config(file: ConfigFile) -> VLMConfig:
    """Sizes of a whole model. Raises ConfigError."""
    parts = encoder_config(file), projector_config(file), decoder_config(file)
    kind = kind_of(file)
    return VLMConfig(*parts, family=FAMILIES[kind].read_as or kind)
