"""Hugging Face names: a SigLIP tower, a decoder, and the whole model as Lfm2VlForConditionalGeneration.

That class's pixel unshuffle orders the values of a visual token by row, column, channel of its patches, which
is the order in which the loader puts them side by side: so the projector's weights are the same as they are.
What a published file has besides, and why a VLM does without it, is said in LEFT_OVER.
"""

from collections.abc import Iterable
from functools import partial

from einops import rearrange
from torch import Tensor

from torchtitan.models.decoder import hf as decoder
from torchtitan.models.weight_names import Row, Transform, prefixed


def _kernel_to_columns(rows: Tensor) -> Tensor:
    """The fixed-size models embed by a convolution; a patch's values stand in the order (p, p, c) here."""
    return rearrange(rows, "d c ph pw -> d (ph pw c)") if rows.ndim == 4 else rows


def _columns_to_kernel(rows: Tensor, patch_size: int) -> Tensor:
    return rearrange(rows, "d (ph pw c) -> d c ph pw", ph=patch_size, pw=patch_size)


TOWER = [
    Row("embeddings.patch_embedding.weight", "embedding.projection.weight", Transform(_kernel_to_columns)),
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
PROJECTOR = [
    Row("layer_norm.*", "norm.*"),
    Row("linear_1.*", "linear_1.*"),
    Row("linear_2.*", "linear_2.*"),
]
# Where a part stands in files; the first is where it is written, alone and in the whole model.
ALONE = {"encoder": ("", "vision_model."), "projector": (), "decoder": ("model.", "")}
WITHIN = {
    "encoder": ("model.vision_tower.", "model.vision_tower.vision_model."),
    "projector": ("model.multi_modal_projector.",),
    "decoder": ("model.language_model.",),
}
BODIES = {"encoder": TOWER, "projector": PROJECTOR, "decoder": decoder.BODY}


def part_rows(part: str, whole: bool) -> list[Row]:
    """Of one part, under its name in our model. `whole`: in files of the whole model, else of the part."""
    places = (WITHIN if whole else ALONE)[part]
    rows = [row for place in places for row in prefixed(BODIES[part], place, part + ".")]
    return rows + (prefixed(decoder.HEAD, "", "decoder.") if part == "decoder" else [])


def as_convolution(rows: Iterable[Row], patch_size: int) -> list[Row]:
    """The same, but that the patch embedding is written as the fixed-size models have it."""
    kernel = Transform(_kernel_to_columns, partial(_columns_to_kernel, patch_size=patch_size))
    return [row._replace(transform=kernel) if row.ours.endswith("projection.weight") else row for row in rows]


# Tensors that a part leaves in the file, and why nothing is lost by it.
LEFT_OVER = {
    "encoder": {
        r"(model\.vision_tower\.)?(vision_model\.)?head\..*": "of the pooling head: a VLM reads the patches",
        r"text_model\..*": "of the text tower, in whose place the decoder stands",
        r"logit_(scale|bias)": "of the contrastive loss",
        r".*\.position_ids": "position_ids, which are computed",
    },
    "projector": {},
    "decoder": {r".*\.rotary_emb\.inv_freq": "rotary frequencies, which are computed"},
}
OF_PARTS = {
    "encoder": r"model\.vision_tower\..*",
    "projector": r"model\.multi_modal_projector\..*",
    "decoder": r"(model\.language_model|lm_head)\..*",
}


def left_over(parts: Iterable[str]) -> dict[str, str]:
    """What a file of which these parts are taken has besides: pattern -> why those tensors are no loss."""
    taken = set(parts)
    reasons = {pattern: why for part in sorted(taken) for pattern, why in LEFT_OVER[part].items()}
    others = {
        pattern: f"of its {part}, which is not taken from it"
        for part, pattern in OF_PARTS.items()
        if part not in taken
    }
    return reasons | others
