"""Hugging Face names: the SigLIP2 vision tower, and the whole model as Lfm2VlForConditionalGeneration.

That class's pixel unshuffle orders the values of a visual token by row, column, channel of its patches, which
is the order in which the loader puts them side by side: so the projector's weights are the same as they are.
The pooling head of a published encoder, its text tower and its logit scale have no place here and are named
in `Weights.unused`.
"""

from collections.abc import Mapping

from torch import Tensor

from experiments.vlm.model.flavors import VLMConfig
from torchtitan.models.decoder import hf as decoder
from torchtitan.models.weight_names import Row, Transform, Weights, prefixed, read, write


def _kernel_to_columns(weight: Tensor) -> Tensor:
    """The fixed-size models embed by a convolution [dim, 3, p, p]; a patch's values stand in the order (p, p,
    3) here.
    """
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight


TOWER = [
    Row(
        "embeddings.patch_embedding.weight", "embedding.projection.weight", Transform(read=_kernel_to_columns)
    ),
    Row("embeddings.patch_embedding.bias", "embedding.projection.bias"),
    Row("embeddings.position_embedding.weight", "embedding.positions.weight"),
    Row("encoder.layers.*.layer_norm1.*", "layers.*.attention_norm.*"),
    Row("encoder.layers.*.self_attn.q_proj.*", "layers.*.attention.wq.*"),
    Row("encoder.layers.*.self_attn.k_proj.*", "layers.*.attention.wk.*"),
    Row("encoder.layers.*.self_attn.v_proj.*", "layers.*.attention.wv.*"),
    Row("encoder.layers.*.self_attn.out_proj.*", "layers.*.attention.wo.*"),
    Row("encoder.layers.*.layer_norm2.*", "layers.*.mlp_norm.*"),
    Row("encoder.layers.*.mlp.fc1.*", "layers.*.mlp.fc1.*"),
    Row("encoder.layers.*.mlp.fc2.*", "layers.*.mlp.fc2.*"),
    Row("post_layernorm.*", "norm.*"),
]
ENCODER_ROWS = TOWER + prefixed(TOWER, "vision_model.", "")

PROJECTOR = [
    Row("layer_norm.*", "norm.*"),
    Row("linear_1.*", "linear_1.*"),
    Row("linear_2.*", "linear_2.*"),
]
VLM_ROWS = [
    *prefixed(TOWER, "model.vision_tower.", "encoder."),
    *prefixed(TOWER, "model.vision_tower.vision_model.", "encoder."),
    *prefixed(PROJECTOR, "model.multi_modal_projector.", "projector."),
    *prefixed(decoder.BODY, "model.language_model.", "decoder."),
    *prefixed(decoder.HEAD, "", "decoder."),
]


def encoder_from_hf(state: Mapping[str, Tensor]) -> Weights:
    """A Siglip2Model, Siglip2VisionModel or their fixed-size kin, under the encoder's names."""
    return read(state, ENCODER_ROWS)


def encoder_to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder under their names, as read by Siglip2VisionModel."""
    return write(state, ENCODER_ROWS)


def vlm_from_hf(state: Mapping[str, Tensor], config: VLMConfig) -> Weights:
    """A Lfm2VlForConditionalGeneration under our names. ValueError: see decoder.hf.with_output."""
    return decoder.with_output(read(state, VLM_ROWS), config.decoder, "decoder.")


def vlm_to_hf(state: Mapping[str, Tensor], config: VLMConfig) -> dict[str, Tensor]:
    """As transformers saves it: a tied output layer is left out."""
    named = write(state, VLM_ROWS)
    if config.decoder.tied_embeddings:
        named.pop("lm_head.weight", None)
    return named
