"""LLaVA-1.5 (Liu et al., 2023) as LlavaForConditionalGeneration: the second last layer of CLIP without its
class token, two linear maps, and a Llama. An image is a square in a border of the mean colour, and no marks
stand around its tokens.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.families.family import RESAMPLE, Family, read_image_processor
from experiments.vlm.model.towers import FIXED, TOWERS, clip, model_type_of, read_encoder, write_encoder
from torchtitan.config.errors import require
from torchtitan.models.decoder import hf_config as decoder
from torchtitan.models.decoder.flavors import DECODERS, DecoderConfig
from torchtitan.models.hf.config_file import ConfigFile

CLIP, LARGE = "clip_vision_model", TOWERS["clip_vision_model"].sizes["clip-L"]
DROPS_CLASS, KEEPS_CLASS = "default", "full"


def encoder_config(
    file: ConfigFile, default: EncoderConfig = LARGE, layer: int = -2, strategy: str = DROPS_CLASS
) -> EncoderConfig:
    """The tower, and which of its layers are read. Without a vision_config it is CLIP's large one, or the
    `default` of another class, which has its own of the others too.
    """
    section, encoder = file.section("vision_config"), default
    if section.values:
        encoder = read_encoder(section.of_kind(model_type_of(default)), among=(CLIP, FIXED))
    strategy = file.get("vision_feature_select_strategy", strategy)
    said = f"{file.where}: vision_feature_select_strategy = {strategy!r}"
    require(strategy in (DROPS_CLASS, KEEPS_CLASS), f"{said}: known are {DROPS_CLASS!r} and {KEEPS_CLASS!r}")
    first = f"{said} would drop a patch of this tower, which has no class token: only {KEEPS_CLASS!r} fits it"
    require(encoder.class_token or strategy == KEEPS_CLASS, first)
    layers = file.values.get("vision_feature_layer")
    layers = [layer] if layers is None else layers if isinstance(layers, list) else [layers]
    listed = f"{file.where}: vision_feature_layer = {layers}: not layers of the {encoder.layers} of the tower"
    depths = [n for n in layers if type(n) is int and -encoder.layers <= n + 1 and n <= encoder.layers]
    require(bool(layers) and depths == layers, listed)
    keeps = strategy == KEEPS_CLASS and encoder.extra_cells > 0
    return replace(encoder, feature_layers=tuple(layers), feature_norm=False, feature_extra=keeps)


def projector_config(file: ConfigFile) -> ProjectorConfig:
    """As wide as the decoder; Megatron's has a width of its own, which the class of transformers has not."""
    file.refuse_all_but("projector_hidden_act", "gelu")
    bias = file.get("multimodal_projector_bias", True)
    width = file.size("projector_hidden_size", decoder_config(file).dim)
    return ProjectorConfig(width, False, 1, bias=bias)


def decoder_config(file: ConfigFile, kind: str = "llama") -> DecoderConfig:
    """Sizes of the causal language model; a section that does not say its own kind has the defaults of
    `kind`. Tied where file or section says so, as in transformers.
    """
    text, key = file.section("text_config").of_kind(kind), "tie_word_embeddings"
    return decoder.decoder_config(text, file.get(key, False) or text.get(key, False))


def resize(folder: Path, encoder: EncoderConfig) -> str:
    """What its image processor does; padded where it has none, as the model was trained. Raises ConfigError
    where that makes images of another size than the tower takes.
    """
    file = read_image_processor(folder)
    if file is None:
        return "padded"
    whole = file.get("image_processor_type", "").startswith("Siglip")  # of those that are no LLaVA's own
    crops, size = file.get("do_center_crop", not whole), sides(file, "size")
    kept = sides(file, "crop_size") if crops else size
    require_sides(file, {*size.values(), *kept.values()}, encoder)
    if file.get("do_pad", False):
        return "padded"
    if "shortest_edge" not in size:
        return "square"
    require(crops, f"{file.where}: do_center_crop = false: images that are no squares")
    return "cropped"


def require_sides(file: ConfigFile, found: set[Any], encoder: EncoderConfig) -> None:
    """Raises ConfigError unless all squares that an image processor makes are of the tower's size."""
    other = f"{file.where}: squares of {sorted(found)} pixels, but the tower takes {encoder.image_size}"
    require(found == {encoder.image_size}, other)


def sides(file: ConfigFile, key: str, default: int = 224) -> dict[str, Any]:
    """A size of the image processor; one number is that of a square, or of the shorter side."""
    value = file.values.get(key)
    if not isinstance(value, dict):
        value = {"shortest_edge" if key == "size" else "height": default if value is None else value}
    given = {side: pixels for side, pixels in value.items() if pixels is not None}
    squares = given.keys() <= {"height", "width"} or given.keys() == {"shortest_edge"}
    good = squares and given and all(type(pixels) is int for pixels in given.values())
    require(bool(good), f"{file.where}: {key} = {file.values.get(key)!r}: expected the pixels of a square")
    return given


def require_llava(config: VLMConfig) -> None:
    """Raises ConfigError where LlavaForConditionalGeneration does not compute what the model does."""
    encoder, projector, parts = config.encoder, config.projector, "export its parts alone (--part)"
    kind = model_type_of(encoder)
    tower = f"LLaVA has no encoder like this {kind}: {parts}"
    require(kind in (CLIP, FIXED) and not encoder.feature_norm, tower)
    plain = ProjectorConfig(config.decoder.dim, False, 1, bias=projector.bias)
    same = replace(projector, norm_eps=plain.norm_eps, norm_first=plain.norm_first) == plain
    require(same, f"LLaVA has no projector like this one: {parts}")


def write(config: VLMConfig, vocab_size: int, image_token_id: int) -> dict[str, Any]:
    """config.json. `vocab_size`: rows of the embedding, padding rows included."""
    encoder, layers = config.encoder, list(config.encoder.feature_layers)
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": write_encoder(encoder),
        "text_config": decoder.hf_config(config.decoder, vocab_size),
        "image_token_index": image_token_id,
        "vision_feature_layer": layers if len(layers) > 1 else layers[0],
        "vision_feature_select_strategy": strategy_of(encoder),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.projector.bias,
        "tie_word_embeddings": config.decoder.tied_embeddings,
    }


def strategy_of(encoder: EncoderConfig) -> str:
    """Whether the class token is read, in their word."""
    return DROPS_CLASS if encoder.class_token and not encoder.feature_extra else KEEPS_CLASS


def processor(config: VLMConfig, plan: ImagePlan) -> dict[str, Any]:
    """LlavaProcessor of a plan. Raises ConfigError unless images are squares of the tower's size."""
    encoder, side = config.encoder, plan.side
    native = "data.resize = native: LLaVA's image processor makes squares: export the parts alone (--part)"
    require(plan.resize != "native", native)
    small = f"images are squares of {side} pixels here, and of {encoder.image_size} in LLaVA's processor: "
    require(side == encoder.image_size, f"{small}raise data.max_patches_per_image")
    square = {"height": side, "width": side}
    image_processor = {
        "image_processor_type": "LlavaImageProcessor",
        "do_convert_rgb": True,
        "do_pad": plan.resize == "padded",
        "do_resize": True,
        "size": square if plan.resize == "square" else {"shortest_edge": side},
        "resample": RESAMPLE[plan.resample],
        "do_center_crop": plan.resize != "square",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.deviation),
    }
    return {
        "processor_class": "LlavaProcessor",
        "image_processor": image_processor,
        "patch_size": encoder.patch_size,
        "vision_feature_select_strategy": strategy_of(encoder),
        "num_additional_image_tokens": encoder.extra_cells,
    }


def _llava(dim: int, layers: int, heads: int, mlp_dim: int) -> VLMConfig:
    """Around Vicuna 1.5, whose embedding got rows for <image> and <pad>, up to a multiple of 64."""
    vicuna = DecoderConfig(
        *(dim, layers, heads, heads, dim // heads, mlp_dim, 32064, 10000.0),
        tied_embeddings=False,
        norm_eps=1e-5,
        context=4096,
    )
    return VLMConfig(LARGE, ProjectorConfig(dim, False, 1), vicuna, "llava", "padded")


# As Megatron trains it: the last layer of CLIP, and a projector without biases and with a width of its own.
MISTRAL = VLMConfig(
    replace(LARGE, feature_layers=(-1,)),
    ProjectorConfig(14336, False, 1, bias=False),
    DecoderConfig(
        *(4096, 32, 32, 8, 128, 14336, 32000, 1000000.0),
        tied_embeddings=False,
        norm_eps=1e-5,
        context=32768,
        model_type="mistral",
    ),
    "llava",
    "padded",
)
FAMILY = Family(
    encoder_config,
    projector_config,
    decoder_config,
    resize,
    require_llava,
    write,
    processor,
    model_type_of,
    {
        "encoder": (
            *("vision_tower.", "vision_tower.vision_model."),
            *("model.vision_tower.", "model.vision_tower.vision_model."),
        ),
        "projector": ("multi_modal_projector.", "model.multi_modal_projector."),
        "decoder": ("language_model.model.", "model.language_model."),
    },
    heads=("language_model.", ""),
    marked=False,
    sizes={
        "llava-1.5-7b": _llava(4096, 32, 32, 11008),
        "llava-1.5-13b": _llava(5120, 40, 40, 13824),
        "megatron-mistral-7b": MISTRAL,
        # A small one, for CPUs: 8 x 8 patches of 14 pixels.
        "llava-debug": VLMConfig(
            EncoderConfig(128, 4, 4, 512, 14, 8, 1e-5, 112, **clip.KIND, activation="quick_gelu"),
            ProjectorConfig(128, False, 1),
            DECODERS["debug"],
            "llava",
            "padded",
        ),
    },
)
