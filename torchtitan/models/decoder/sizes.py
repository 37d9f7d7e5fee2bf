"""Parameters of a decoder, piece by piece, in closed form: for planning without building it. Imports no torch."""

from torchtitan.models.decoder.flavors import DecoderConfig


def attention_parameters(config: DecoderConfig) -> int:
    """Matrices and biases of q, k, v and the output projection."""
    width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    biases = width + 2 * kv_width if config.qkv_bias else 0
    return config.dim * (2 * width + 2 * kv_width) + biases


def layer_parameters(config: DecoderConfig) -> int:
    """With its norms."""
    norms = 2 * config.dim + (2 * config.head_dim if config.qk_norm else 0)
    return attention_parameters(config) + 3 * config.dim * config.mlp_dim + norms


def embedding_parameters(config: DecoderConfig, vocab_size: int) -> int:
    return config.dim * vocab_size


def decoder_parameters(config: DecoderConfig, vocab_size: int) -> int:
    tables = 1 if config.tied_embeddings else 2
    return config.layers * layer_parameters(config) + tables * embedding_parameters(config, vocab_size) + config.dim
