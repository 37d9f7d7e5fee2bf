"""Hugging Face names: an encoder (towers/), a decoder, a whole model (families/).

What a published file has besides, and why a VLM does without it, is said in `left_over`.
"""

from collections.abc import Iterable

from experiments.vlm.model.config import EncoderConfig
from experiments.vlm.model.families.family import Family
from experiments.vlm.model.towers import TOWERS, tower_of
from torchtitan.models.decoder import hf as decoder
from torchtitan.models.weight_names import Row, prefixed

# Where a part stands in files of its own; the first is where it is written.
ALONE = {"encoder": ("", "vision_model."), "projector": (), "decoder": ("model.", "")}
# What files hold besides a part, and why nothing is lost by it; for encoders their towers say it.
LEFT_OVER = {
    "decoder": {r".*\.rotary_emb\.inv_freq": "rotary frequencies, which are computed"},
}
OF_PARTS = {
    "encoder": r"(model\.)?vision_tower\..*",
    "projector": r"(model\.)?(multi_modal_projector\..*|mm_projector\..*|image_newline)",
    "decoder": r"((model\.)?language_model|lm_head|model\.(embed_tokens|layers|norm))\..*",
}


def part_rows(part: str, encoder: EncoderConfig | None, family: Family | None) -> list[Row]:
    """Rows of one part, under its name in our model. `family`: of the whole model whose files they are; None:
    the part has files of its own. `encoder`: needed for that part alone.
    """
    places, body = (family.places if family else ALONE)[part], _body(part, encoder, family)
    rows = [row for place in places for row in prefixed(body, place, part + ".")]
    if family and part == "projector":
        rows += [Row(name, "projector.newline") for name in family.newline]
    heads = (family.heads if family else ("",)) if part == "decoder" else ()
    return rows + [row for head in heads for row in prefixed(decoder.HEAD, head, "decoder.")]


def _body(part: str, encoder: EncoderConfig | None, family: Family | None) -> Iterable[Row]:
    if part == "decoder":
        return decoder.BODY
    if part == "projector":
        return family.projector_rows if family else ()
    assert encoder is not None
    return (TOWERS[family.tower(encoder)] if family else tower_of(encoder)).rows(encoder)


def left_over(parts: Iterable[str], encoder: EncoderConfig | None) -> dict[str, str]:
    """What a file of which these parts are taken has besides: pattern -> why those tensors are no loss."""
    taken = set(parts)
    reasons = {pattern: why for part in sorted(taken) for pattern, why in LEFT_OVER.get(part, {}).items()}
    if encoder is not None and "encoder" in taken:
        anywhere = r"(model\.)?(vision_tower\.){0,2}(vision_model\.)?"
        reasons |= {anywhere + name: why for name, why in tower_of(encoder).left_over.items()}
    others = {
        pattern: f"of its {part}, which is not taken from it"
        for part, pattern in OF_PARTS.items()
        if part not in taken
    }
    return reasons | others
