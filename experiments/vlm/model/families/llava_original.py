"""LLaVA-1.5 as its authors save it (haotian-liu/LLaVA), for their scripts: the sizes of a Llama, the
projector among its layers, and the name of a CLIP whose weights are there only where they were trained.

It is read as LLaVA-1.5, and written on request. An image has no row of the embedding there.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.families.llava import CLIP, LARGE, require_llava
from experiments.vlm.model.families.llava import FAMILY as LLAVA
from experiments.vlm.model.towers import read_encoder
from torchtitan.config.errors import ConfigError, require
from torchtitan.models.decoder import hf_config as decoder
from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.models.hf.config_file import CONFIG, ConfigFile, read_config
from torchtitan.models.hf.folder import read_tensors
from torchtitan.models.weight_names import Row

MODEL_TYPE, TOWER = "llava_llama", "mm_vision_tower"
NAMES = {
    "openai/clip-vit-large-patch14-336": LARGE,
    "openai/clip-vit-large-patch14": replace(LARGE, image_size=224, position_grid=16),
}
FEATURES = {"patch": False, "cls_patch": True}  # word -> whether the class token is read
INSIDE = "model.vision_tower."
PROJECTOR = [
    *(Row(f"{2 * number}.*", f"linear_{number + 1}.*") for number in range(8)),
    *(Row(name, f"linear_1.{name}") for name in ("weight", "bias")),  # of a linear one
]


def is_original(file: ConfigFile) -> bool:
    """Older ones share their model_type with the class of transformers."""
    return file.model_type in (MODEL_TYPE, "llava") and file.values.get(TOWER) is not None


def tower_folder(file: ConfigFile) -> Path | None:
    """The folder of CLIP that a config.json names, if it is here: as named, or next to the config.json."""
    name = file.get(TOWER, "")
    places = Path(name).expanduser(), Path(file.where).parent / name
    return next((path for path in places if name and (path / CONFIG).is_file()), None)


def tower_weights(folder: Path) -> Path:
    """The folder itself where the tower was trained, else the one it names. Raises ConfigError without."""
    if any(name.startswith(INSIDE) for name in read_tensors(folder)):
        return folder
    file = read_config(folder)
    said, named = f"{file.where}: {TOWER} = {file.get(TOWER, '')}", tower_folder(file)
    option = "name its folder with checkpoint.initial_load_encoder_path"
    if named is None:
        raise ConfigError(f"{said}: the tower is neither here nor in {folder}: {option}")
    return named


def encoder_config(file: ConfigFile) -> EncoderConfig:
    """The tower of the folder that is named, else the one known by that name."""
    name, folder = file.get(TOWER, ""), tower_folder(file)
    known = {Path(each).name: sizes for each, sizes in NAMES.items()}
    unknown = f"{file.where}: {TOWER} = {name}: no such folder, and none of {', '.join(known)}"
    require(folder is not None or Path(name).name in known, unknown)
    encoder = read_encoder(read_config(folder), (CLIP, "clip")) if folder else known[Path(name).name]
    word = file.get("mm_vision_select_feature", "patch")
    listed = f"{file.where}: mm_vision_select_feature = {word!r}: known are {', '.join(FEATURES)}"
    require(word in FEATURES, listed)
    layer = file.get("mm_vision_select_layer", -2)
    deep = f"{file.where}: mm_vision_select_layer = {layer}: not one of the {encoder.layers} of the tower"
    require(-encoder.layers <= layer + 1 and layer <= encoder.layers, deep)
    width = file.get("mm_hidden_size", encoder.dim)
    require(width == encoder.dim, f"{file.where}: mm_hidden_size = {width}, but {name} is {encoder.dim} wide")
    return replace(encoder, feature_layers=(layer,), feature_norm=False, feature_extra=FEATURES[word])


def projector_config(file: ConfigFile) -> ProjectorConfig:
    """`linear`, or `mlp{n}x_gelu` of n linear maps, all as wide as the decoder."""
    kind = file.get("mm_projector_type", "linear")
    found = re.fullmatch(r"mlp([1-8])x_gelu", kind)
    listed = f"{file.where}: mm_projector_type = {kind!r}: not supported here, only linear and mlp{{n}}x_gelu"
    require(kind == "linear" or found is not None, listed)
    file.refuse_all_but("mm_use_im_start_end", False)
    return ProjectorConfig(decoder_config(file).dim, False, 1, linears=int(found[1]) if found else 1)


def decoder_config(file: ConfigFile) -> DecoderConfig:
    """Sizes of the causal language model, which stand at the top."""
    values = {**file.values, "model_type": "llama"}
    return decoder.decoder_config(ConfigFile(values, file.where), file.get("tie_word_embeddings", False))


def resize(folder: Path, encoder: EncoderConfig) -> str:
    """Padded, or cropped by the processor of CLIP."""
    file = read_config(folder)
    ratio = file.get("image_aspect_ratio", "square")
    known = f"{file.where}: image_aspect_ratio = {ratio!r}: not supported here, only 'pad' and 'square'"
    require(ratio in ("pad", "square"), known)
    return "padded" if ratio == "pad" else "cropped"


def require_original(config: VLMConfig) -> None:
    """Raises ConfigError where their LlavaLlamaForCausalLM does not compute what the model does."""
    kinds = f"a {config.family} model" if config.family != "llava" else ""
    if decoder.model_type_of(config.decoder) != "llama":
        kinds = f"a {decoder.model_type_of(config.decoder)} decoder"
    elif len(config.encoder.feature_layers) > 1 or not config.encoder.class_token:
        kinds = "such a tower"
    elif not config.projector.bias or config.projector.linears < 2:
        kinds = "such a projector"
    require(not kinds, f"LLaVA's authors have no layout for {kinds}: write that of transformers")
    require_llava(replace(config, projector=replace(config.projector, linears=2)))


def write(config: VLMConfig, vocab_size: int, image_token_id: int) -> dict[str, Any]:
    """config.json; the tower is named as one of that size was published, if it was."""
    encoder, words = config.encoder, {kept: word for word, kept in FEATURES.items()}
    plain = replace(encoder, feature_layers=LARGE.feature_layers, feature_extra=False)
    return {
        **decoder.hf_config(config.decoder, vocab_size),
        "model_type": MODEL_TYPE,
        "architectures": ["LlavaLlamaForCausalLM"],
        TOWER: next((name for name, sizes in NAMES.items() if sizes == plain), None),
        "mm_hidden_size": encoder.dim,
        "mm_projector_type": f"mlp{config.projector.linears}x_gelu",
        "mm_vision_select_layer": encoder.feature_layers[0],
        "mm_vision_select_feature": words[encoder.feature_extra],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": True,  # so that the weights written here are read, not those of the name
        "image_aspect_ratio": "pad" if config.resize == "padded" else "square",
    }


def processor(config: VLMConfig, plan: ImagePlan) -> dict[str, Any]:
    """None: it is that of the tower. Raises ConfigError for a plan that their scripts do not have."""
    if plan.resize not in ("padded", "cropped"):
        raise ConfigError(f"data.resize = {plan.resize}: LLaVA's scripts have padded and cropped squares")
    LLAVA.processor(config, plan)  # raises for squares of another size
    return {}


FAMILY = replace(
    LLAVA,
    encoder=encoder_config,
    projector=projector_config,
    decoder=decoder_config,
    resize=resize,
    require=require_original,
    write=write,
    processor=processor,
    places={
        "encoder": (f"{INSIDE}vision_tower.vision_model.", f"{INSIDE}vision_tower."),
        "projector": ("model.mm_projector.",),
        "decoder": ("model.",),
    },
    projector_rows=PROJECTOR,
    heads=("",),
    tower_weights=tower_weights,
    read_as="llava",
    image_row=False,
    sizes={},
)
