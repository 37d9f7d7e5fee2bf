"""Sizes of published decoders, as rows. Imports no torch, so that jobs are checked before it loads.

Sources: each model's config.json on the Hugging Face hub. A choice of a run (attention backend, dtype,
compile) is an option of the job, never a row here.
"""

from dataclasses import dataclass

from torchtitan.layers.rope_scaling import RopeScaling


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and kinds of one decoder."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int  # rows of the published embedding; a tokenizer with more ids enlarges it
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied_embeddings: bool = False  # the output layer is the embedding
    qkv_bias: bool = False  # Qwen 2
    qk_norm: bool = False  # Qwen 3: RMSNorm on each head of q and k
    context: int = 4096  # longest document of its training; goes into an exported config.json
    # tokens that a query saw in its training, itself included (Mistral); None: all of the document. Nothing
    # limits them here, so no document may be longer.
    window: int | None = None
    model_type: str = ""  # its class in transformers, where it came from there (hf_config.py)


def _llama(dim: int, layers: int, heads: int, mlp_dim: int, factor: float, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        dim,
        layers,
        heads,
        8,
        dim // heads,
        mlp_dim,
        128256,
        500000.0,
        RopeScaling(factor),
        norm_eps=1e-5,
        tied_embeddings=tied,
        context=131072,
    )


def _qwen2(
    dim: int, layers: int, heads: int, kv_heads: int, mlp_dim: int, tied: bool, vocab_size: int = 151936
) -> DecoderConfig:
    return DecoderConfig(
        dim,
        layers,
        heads,
        kv_heads,
        dim // heads,
        mlp_dim,
        vocab_size,
        1000000.0,
        tied_embeddings=tied,
        qkv_bias=True,
        context=32768,
    )


def _qwen3(dim: int, layers: int, heads: int, mlp_dim: int, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        dim,
        layers,
        heads,
        8,
        128,
        mlp_dim,
        151936,
        1000000.0,
        tied_embeddings=tied,
        qk_norm=True,
        context=40960,
    )


DECODERS = {
    # Rows for the tokenizer of assets/tokenizer.
    "debug": DecoderConfig(128, 3, 4, 2, 32, 384, 1024, 10000.0, tied_embeddings=False, norm_eps=1e-5),
    "llama3.2-1B": _llama(2048, 16, 32, 8192, 32.0, tied=True),
    "llama3.2-3B": _llama(3072, 28, 24, 8192, 32.0, tied=True),
    "llama3.1-8B": _llama(4096, 32, 32, 14336, 8.0, tied=False),
    "qwen2.5-0.5B": _qwen2(896, 24, 14, 2, 4864, tied=True),
    "qwen2.5-1.5B": _qwen2(1536, 28, 12, 2, 8960, tied=True),
    "qwen2.5-3B": _qwen2(2048, 36, 16, 2, 11008, tied=True),
    "qwen2.5-7B": _qwen2(3584, 28, 28, 4, 18944, tied=False, vocab_size=152064),
    "qwen3-0.6B": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7B": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4B": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8B": _qwen3(4096, 36, 32, 12288, tied=False),
}
