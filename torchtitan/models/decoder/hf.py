"""Hugging Face names of the decoder's weights: LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM share
them.

The rotary layout is theirs already (rope.py), so no weight changes on the way.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.models.weight_names import Row, Weights, prefixed, read, write

BODY = [
    Row("embed_tokens.weight", "tok_embeddings.weight"),
    Row("layers.*.input_layernorm.weight", "layers.*.attention_norm.weight"),
    Row("layers.*.self_attn.q_proj.*", "layers.*.attention.wq.*"),
    Row("layers.*.self_attn.k_proj.*", "layers.*.attention.wk.*"),
    Row("layers.*.self_attn.v_proj.*", "layers.*.attention.wv.*"),
    Row("layers.*.self_attn.o_proj.weight", "layers.*.attention.wo.weight"),
    Row("layers.*.self_attn.q_norm.weight", "layers.*.attention.q_norm.weight"),
    Row("layers.*.self_attn.k_norm.weight", "layers.*.attention.k_norm.weight"),
    Row("layers.*.post_attention_layernorm.weight", "layers.*.ffn_norm.weight"),
    Row("layers.*.mlp.gate_proj.weight", "layers.*.feed_forward.w1.weight"),
    Row("layers.*.mlp.down_proj.weight", "layers.*.feed_forward.w2.weight"),
    Row("layers.*.mlp.up_proj.weight", "layers.*.feed_forward.w3.weight"),
    Row("norm.weight", "norm.weight"),
]
HEAD = [Row("lm_head.weight", "output.weight")]
ROWS = prefixed(BODY, "model.", "") + HEAD


def with_output(weights: Weights, config: DecoderConfig, prefix: str = "") -> Weights:
    """A file of a tied model holds the embedding alone: it serves as the output layer too.

    ValueError where the file has another output layer and `config` ties the two.
    """
    named = dict(weights.named)
    embedding, output = named.get(prefix + "tok_embeddings.weight"), named.get(prefix + "output.weight")
    if embedding is not None and output is None:
        named[prefix + "output.weight"] = embedding
    elif (
        embedding is not None
        and output is not None
        and config.tied_embeddings
        and not torch.equal(embedding, output)
    ):
        raise ValueError(
            "lm_head.weight is not the embedding, but this flavor ties the two: use a flavor that does not"
        )
    return Weights(named, weights.unused)


def from_hf(state: Mapping[str, Tensor], config: DecoderConfig) -> Weights:
    """Weights under our names. ValueError: see `with_output`."""
    return with_output(read(state, ROWS), config)


def to_hf(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """As transformers saves it: a tied output layer is left out."""
    named = write(state, ROWS)
    if config.tied_embeddings:
        named.pop("lm_head.weight", None)
    return named
