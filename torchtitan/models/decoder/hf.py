"""Hugging Face names of the decoder's weights, which all its families share.

The rotary layout is theirs already (rope.py), so no weight changes on the way. Where the output layer is the
embedding it has no name in a file.
"""

from torchtitan.models.weight_names import Row

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
