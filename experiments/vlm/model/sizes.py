"""Parameters of the vision side, in closed form: for planning without building it. Imports no torch."""

from experiments.vlm.model.flavors import EncoderConfig, ProjectorConfig, VLMConfig
from torchtitan.models.decoder.sizes import decoder_parameters


def encoder_layer_parameters(config: EncoderConfig) -> int:
    """Four projections and two of the MLP, all with biases, and two LayerNorms."""
    attention = 4 * (config.dim**2 + config.dim)
    mlp = 2 * config.dim * config.mlp_dim + config.mlp_dim + config.dim
    return attention + mlp + 4 * config.dim


def patch_embedding_parameters(config: EncoderConfig) -> int:
    """The linear map of a patch and the table of positions."""
    return (config.patch_size**2 * 3 + 1) * config.dim + config.position_grid**2 * config.dim


def encoder_parameters(config: EncoderConfig) -> int:
    return config.layers * encoder_layer_parameters(config) + patch_embedding_parameters(config) + 2 * config.dim


def projector_parameters(config: ProjectorConfig, encoder_dim: int, merge_size: int, dim: int) -> int:
    width = encoder_dim * merge_size**2
    norm = 2 * width if config.layer_norm else 0
    return norm + (width + 1) * config.hidden_dim + (config.hidden_dim + 1) * dim


def vlm_parameters(config: VLMConfig, vocab_size: int, merge_size: int) -> int:
    projector = projector_parameters(config.projector, config.encoder.dim, merge_size, config.decoder.dim)
    return encoder_parameters(config.encoder) + projector + decoder_parameters(config.decoder, vocab_size)
