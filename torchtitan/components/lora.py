"""Which linear maps of a model get an adapter ([lora]), and what that freezes."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from torchtitan.config.errors import ConfigError, did_you_mean
from torchtitan.config.job import LoRA
from torchtitan.layers.lora import LoRALinear, Shape

Map = TypeVar("Map", bound=nn.Module)


def matching_maps(
    model: nn.Module, maps: Mapping[str, Map], patterns: Sequence[str], key: str
) -> dict[str, Map]:
    """Those of the model's `maps` that the patterns find, by name. Raises ConfigError, which names the option
    `key`, where one finds none.
    """
    chosen: dict[str, Map] = {}
    for pattern in patterns:
        found = {name: module for name, module in maps.items() if re.search(pattern, name)}
        if not found:
            none = f"{key} = {pattern}: no linear map is called so (one is {next(iter(maps))})"
            parts = [name for name, _ in model.named_children()]
            raise ConfigError(f"{none}{did_you_mean(pattern, parts)}")
        chosen |= found
    return chosen


def adapt(model: nn.Module, options: LoRA) -> None:
    """Give linear maps their adapters, in place, and freeze all else of the parts in which one stands.

    `model`: whole and plain. Raises ConfigError where a pattern finds no map.
    """
    if not options.rank:
        return
    shape = Shape(options.rank, options.alpha, options.dropout)
    maps = {
        name: module
        for name, module in model.named_modules()
        # Excluded are layers that compute more than a map, such as an output layer with its loss, and layers
        # that never run, which are frozen before anything else.
        if type(module) is nn.Linear and module.weight.requires_grad
    }
    chosen = matching_maps(model, maps, options.patterns, "lora.patterns")
    for part in {name.partition(".")[0] for name in chosen}:
        model.get_submodule(part).requires_grad_(False)
    for name, module in chosen.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear.around(module, shape))
