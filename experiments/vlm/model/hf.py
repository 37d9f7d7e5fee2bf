"""Hugging Face names: an encoder (towers/), a decoder, the whole model as Lfm2VlForConditionalGeneration.

That class's pixel unshuffle orders the values of a visual token by row, column, channel of its patches, which
is the order in which the loader puts them side by side: so the projector's weights are the same as they are.
What a published file has besides, and why a VLM does without it, is said in `left_over`.
"""

from collections.abc import Iterable

from experiments.vlm.model.config import EncoderConfig
from experiments.vlm.model.towers import NAFLEX, TOWERS, tower_of
from torchtitan.models.decoder import hf as decoder
from torchtitan.models.weight_names import Row, prefixed

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
BODIES = {"projector": PROJECTOR, "decoder": decoder.BODY}
# What a part has in files besides, and why nothing is lost by it; of encoders their towers say it.
LEFT_OVER = {
    "decoder": {r".*\.rotary_emb\.inv_freq": "rotary frequencies, which are computed"},
}
OF_PARTS = {
    "encoder": r"model\.vision_tower\..*",
    "projector": r"model\.multi_modal_projector\..*",
    "decoder": r"(model\.language_model|lm_head)\..*",
}


def part_rows(part: str, encoder: EncoderConfig | None, whole: bool) -> list[Row]:
    """Of one part, under its name in our model. `whole`: in files of the whole model, else of the part.
    `encoder`: needed for that part alone.
    """
    body = BODIES[part] if encoder is None or part != "encoder" else encoder_rows(encoder, whole)
    rows = [row for place in (WITHIN if whole else ALONE)[part] for row in prefixed(body, place, part + ".")]
    return rows + (prefixed(decoder.HEAD, "", "decoder.") if part == "decoder" else [])


def encoder_rows(encoder: EncoderConfig, whole: bool) -> list[Row]:
    """Without a prefix. In the whole model a SigLIP tower of one size is one of any size."""
    kin = TOWERS[NAFLEX] if whole and not encoder.model_type else tower_of(encoder)
    return kin.rows(encoder)


def left_over(parts: Iterable[str], encoder: EncoderConfig | None) -> dict[str, str]:
    """What a file of which these parts are taken has besides: pattern -> why those tensors are no loss."""
    taken = set(parts)
    reasons = {pattern: why for part in sorted(taken) for pattern, why in LEFT_OVER.get(part, {}).items()}
    if encoder is not None and "encoder" in taken:
        anywhere = r"(model\.vision_tower\.)?(vision_model\.)?"
        reasons |= {anywhere + name: why for name, why in tower_of(encoder).left_over.items()}
    others = {
        pattern: f"of its {part}, which is not taken from it"
        for part, pattern in OF_PARTS.items()
        if part not in taken
    }
    return reasons | others
