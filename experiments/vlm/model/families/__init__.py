"""Whole models of other libraries: a file for each family, and a line here that finds it by its model_type.

    family.py    what a family says of itself
    lfm2_vl.py   our composition
    llava.py     LLaVA-1.5
    llava_original.py   the same as its authors save it
    llava_next.py, llava_onevision.py   the same with tiles (tiled.py: what they have in common)

Imports no torch.
"""

from experiments.vlm.model.config import VLMConfig
from experiments.vlm.model.families import lfm2_vl, llava, llava_next, llava_onevision, llava_original
from experiments.vlm.model.families.family import Family
from torchtitan.models.hf.config_file import ConfigFile

FAMILIES = {
    lfm2_vl.WHOLE: lfm2_vl.FAMILY,
    "llava": llava.FAMILY,
    llava_original.MODEL_TYPE: llava_original.FAMILY,
    "llava_next": llava_next.FAMILY,
    "llava_onevision": llava_onevision.FAMILY,
}


def family_of(config: VLMConfig) -> Family:
    """The family of a model."""
    return FAMILIES[config.family]


def kind_of(file: ConfigFile) -> str:
    """The name of a config.json's family; empty where it is of none."""
    if llava_original.is_original(file):
        return llava_original.MODEL_TYPE
    return file.model_type if file.model_type in FAMILIES else ""


def family_in(file: ConfigFile) -> Family | None:
    """The family of a config.json; None where it is of none."""
    return FAMILIES.get(kind_of(file))
