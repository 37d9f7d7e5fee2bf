"""Whole models of other libraries: a file for each family, and a line here that tells it from its model_type.

    family.py    what a family says of itself
    lfm2_vl.py   our composition
    llava.py     LLaVA-1.5

Imports no torch.
"""

from experiments.vlm.model.config import VLMConfig
from experiments.vlm.model.families import lfm2_vl, llava
from experiments.vlm.model.families.family import Family

FAMILIES = {lfm2_vl.WHOLE: lfm2_vl.FAMILY, "llava": llava.FAMILY}


def family_of(config: VLMConfig) -> Family:
    """The one that a model is of."""
    return FAMILIES[config.family]
