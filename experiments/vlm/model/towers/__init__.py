"""Encoders of other libraries: a file for each family, and a line here that finds it by its model_type.

    tower.py     what a family says of itself
    siglip.py    SigLIP2 of any size of image (NaFlex), SigLIP of one size
    clip.py      CLIP
    aimv2.py     AIMv2, native or of one size
    dinov3.py    DINOv3

docs/adding_a_tower.md adds one. Imports no torch.
"""

from typing import Any

from experiments.vlm.model.config import EncoderConfig
from experiments.vlm.model.towers import aimv2, clip, dinov3, siglip
from experiments.vlm.model.towers.tower import Tower
from torchtitan.config.errors import require
from torchtitan.models.hf.config_file import ConfigFile

NAFLEX, FIXED = "siglip2_vision_model", "siglip_vision_model"
TOWERS = {
    NAFLEX: siglip.NAFLEX,
    FIXED: siglip.FIXED,
    "clip_vision_model": clip.TOWER,
    "aimv2_vision_model": aimv2.TOWER,
    "dinov3_vit": dinov3.TOWER,
}
# model_type of a larger model -> that of the tower in its vision_config
INSIDE = {larger: kind for kind, tower in TOWERS.items() for larger in tower.inside}


def model_type_of(config: EncoderConfig) -> str:
    """Its class; sizes of SigLIP do not name theirs."""
    return config.model_type or (NAFLEX if config.image_size is None else FIXED)


def tower_of(config: EncoderConfig) -> Tower:
    """The family of an encoder."""
    return TOWERS[model_type_of(config)]


def read_encoder(file: ConfigFile, among: tuple[str, ...] = ()) -> EncoderConfig:
    """A tower's sizes, or those of a larger model's tower. `among`: the only towers that are meant.

    Raises ConfigError for what the encoder is not.
    """
    kind = file.model_type
    if kind in INSIDE and not among:
        file = file.section("vision_config")
        kind = file.model_type or INSIDE[kind]
    known = among or (*TOWERS, *INSIDE)
    no_such = f"{file.where}: model_type = {kind!r}: no encoder of that kind here; known: {', '.join(known)}"
    require(kind in TOWERS and kind in known, no_such)
    return TOWERS[kind].read(file)


def write_encoder(config: EncoderConfig, kind: str = "") -> dict[str, Any]:
    """What config.json says of the tower, without a pooling head. `kind`: another class that can hold it."""
    kind = kind or model_type_of(config)
    return {"model_type": kind, **TOWERS[kind].write(config)}
