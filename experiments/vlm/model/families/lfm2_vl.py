"""Our composition as Lfm2VlForConditionalGeneration: a SigLIP2 tower, any decoder, images of their own size.

That class's pixel unshuffle orders the values of a visual token by row, column, channel of its patches, which
is the order in which the loader puts them side by side: so the projector's weights are the same as they are.
"""

from dataclasses import replace
from typing import Any

from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.families.family import RESAMPLE, Family
from experiments.vlm.model.towers import FIXED, NAFLEX, model_type_of, read_encoder, write_encoder
from torchtitan.config.errors import require
from torchtitan.models.decoder import hf_config as decoder
from torchtitan.models.hf.config_file import ConfigFile

WHOLE = "lfm2_vl"


def encoder_config(file: ConfigFile) -> EncoderConfig:
    """Sizes of the tower."""
    return read_encoder(file.section("vision_config").of_kind(NAFLEX), among=(NAFLEX, FIXED))


def projector_config(file: ConfigFile) -> ProjectorConfig:
    """Sizes of the projector."""
    file.refuse_all_but("projector_hidden_act", "gelu")
    file.refuse_all_but("projector_bias", True)
    return ProjectorConfig(
        file.size("projector_hidden_size", 2560),
        file.get("projector_use_layernorm", True),
        file.size("downsample_factor", 2),
    )


def decoder_config(file: ConfigFile) -> decoder.DecoderConfig:
    """Sizes of the causal language model."""
    text = file.section("text_config")
    for place, key in ((file, "tie_embedding"), (file, "tie_word_embeddings"), (text, "tie_word_embeddings")):
        if place.values.get(key) is not None:
            return decoder.decoder_config(text, place.get(key, True))
    return decoder.decoder_config(text, True)


def require_lfm2_vl(config: VLMConfig) -> None:
    """Raises ConfigError where Lfm2VlForConditionalGeneration does not compute what the model does."""
    kind, plain = model_type_of(config.encoder), ProjectorConfig(config.projector.hidden_dim)
    parts = "export its parts alone (--part)"
    siglip = f"no class of transformers has a {kind} as the encoder of a model like this: {parts}"
    require(kind in (NAFLEX, FIXED), siglip)
    other = replace(config.projector, layer_norm=plain.layer_norm, merge_size=plain.merge_size) != plain
    require(not other, f"no class of transformers has a projector like this one: {parts}")


def write(config: VLMConfig, vocab_size: int, image_token_id: int) -> dict[str, Any]:
    """config.json. `vocab_size`: rows of the embedding, padding rows included."""
    return {
        "model_type": WHOLE,
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "vision_config": write_encoder(config.encoder, NAFLEX),
        "text_config": decoder.hf_config(config.decoder, vocab_size),
        "image_token_id": image_token_id,
        "downsample_factor": config.projector.merge_size,
        "projector_hidden_size": config.projector.hidden_dim,
        "projector_use_layernorm": config.projector.layer_norm,
        "projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": config.decoder.tied_embeddings,
    }


def processor(config: VLMConfig, plan: ImagePlan) -> dict[str, Any]:
    """An Lfm2VlImageProcessor that makes an image's patches by our rule (ImagePlan.grid).

    Raises ConfigError where images are made square, which it cannot do.
    """
    square = f"data.resize = {plan.resize}: no processor of transformers that fits the whole model does so"
    require(plan.resize == "native", f"{square}: export its parts alone")
    least, most = (pixels / (plan.merge_size * plan.patch_size) ** 2 for pixels in plan.limits)
    image_processor = {
        "image_processor_type": "Lfm2VlImageProcessor",
        "do_image_splitting": False,
        "do_resize": True,
        "resample": RESAMPLE[plan.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.encoder.mean),
        "image_std": list(config.encoder.deviation),
        "do_pad": True,
        "encoder_patch_size": plan.patch_size,
        "downsample_factor": plan.merge_size,
        "min_image_tokens": _whole(least),
        "max_image_tokens": _whole(most),
    }
    return {"processor_class": "Lfm2VlProcessor", "image_processor": image_processor}


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


FAMILY = Family(
    encoder_config,
    projector_config,
    decoder_config,
    lambda folder, encoder: "native",
    require_lfm2_vl,
    write,
    processor,
    # A SigLIP tower of one size is one of any size here.
    lambda encoder: encoder.model_type or NAFLEX,
    {
        "encoder": ("model.vision_tower.", "model.vision_tower.vision_model."),
        "projector": ("model.multi_modal_projector.",),
        "decoder": ("model.language_model.",),
    },
)
