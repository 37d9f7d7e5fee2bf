"""Which linear maps of a model compute in fp8 ([float8]), by torchao (https://github.com/pytorch/ao).

A map y = x W^T and both products of its backward take numbers of 8 bits (e4m3: 4 of exponent, 3 of mantissa),
each row of a factor scaled so that its largest number just fits. Weights, gradients and activations between
maps keep their dtypes and names, so layouts, checkpoints and files are not affected.

Unusual here: maps are chosen as adapters are ([lora]), and no map is left out without a line in the log.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping

import torch
from torch import nn

from torchtitan.components.lora import matching_maps
from torchtitan.config.errors import ConfigError, require
from torchtitan.config.float8 import MULTIPLE, Share
from torchtitan.config.job import Float8
from torchtitan.layers.lora import LoRALinear, is_adapters
from torchtitan.tools.logging import logger, warn_once

CAPABILITY = (8, 9)  # Ada; Hopper and Blackwell have more


def require_device(options: Float8, device: torch.device) -> None:
    """Raises ConfigError where this device has no fp8 products."""
    if not options.enable or options.emulate:
        return
    emulate = "float8.emulate computes with the same numbers on any device, slowly"
    require(device.type == "cuda" and torch.version.hip is None, f"float8.enable needs CUDA; {emulate}")
    major, minor = torch.cuda.get_device_capability(device)
    least = "{}.{}".format(*CAPABILITY)
    require(
        (major, minor) >= CAPABILITY,
        f"float8.enable needs a GPU of compute capability {least} or more, and "
        f"{torch.cuda.get_device_name(device)} has {major}.{minor}; {emulate}",
    )


def convert(model: nn.Module, options: Float8, shares: Mapping[str, Share]) -> None:
    """Let the chosen linear maps compute in fp8, in place, with the parameters that they have.

    `model`: whole and plain, with its adapters. `shares`: of each part. Raises ConfigError where a pattern
    finds no map, or one that cannot be converted.
    """
    if not options.enable:
        return
    chosen = chosen_maps(model, options)
    for name, module in chosen.items():
        _require_plain(name, module)
    fitting = {name for name, module in chosen.items() if _fits(module, shares[_part(name)])}
    require(
        bool(fitting),
        f"float8.patterns = {' '.join(options.patterns)}: no map has sizes that are multiples of {MULTIPLE} "
        f"on each rank ({_sizes(chosen)})",
    )
    if options.recipe_name == "rowwise":
        for part in sorted({_part(name) for name in fitting}):
            _require_rows(part, shares[part].rows)
    # Imported here: it takes seconds, and is an extra. Its kernels that may fail to load are not those of
    # fp8.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(options.recipe_name)
    convert_to_float8_training(
        model,
        config=dataclasses.replace(config, emulate=options.emulate),
        module_filter_fn=lambda module, name: name in fitting,
    )


def chosen_maps(model: nn.Module, options: Float8) -> dict[str, nn.Module]:
    """The maps that float8.patterns find and float8.filter_fqns do not, by name, whatever their sizes."""
    maps: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_adapters(f"{name}.")
    }
    chosen = matching_maps(model, maps, options.patterns, "float8.patterns")
    for text in options.filter_fqns:
        used = any(text in name for name in maps)
        require(used, f"float8.filter_fqns = {text}: no linear map has this in its name")
    chosen = {n: m for n, m in chosen.items() if not any(text in n for text in options.filter_fqns)}
    require(bool(chosen), "float8.filter_fqns leaves none of the maps that float8.patterns finds")
    return chosen


def _require_plain(name: str, module: nn.Module) -> None:
    if isinstance(module, LoRALinear):
        raise ConfigError(
            f"float8.patterns find {name}, which has an adapter ([lora]): choose other maps for one of them"
        )
    require(
        type(module) is nn.Linear,
        f"float8.patterns find {name}, which computes more than a linear map, such as its loss, and not in "
        f"fp8: name it in float8.filter_fqns",
    )


def log_float8(model: nn.Module, options: Float8) -> None:
    """Log what computes in fp8, and what was chosen and does not. `model`: converted."""
    if not options.enable:
        return
    from torchao.float8.float8_linear import Float8Linear

    chosen = chosen_maps(model, options)
    left = {name: module for name, module in chosen.items() if not isinstance(module, Float8Linear)}
    parts = ", ".join(dict.fromkeys(_part(name) for name in chosen if name not in left))
    logger.info(f"fp8, {options.recipe_name}: {len(chosen) - len(left)} linear maps of {parts}")
    if left:
        logger.info(f"not in fp8, their sizes on a rank are no multiples of {MULTIPLE}: {_sizes(left)}")
    if options.emulate:
        warn_once("float8.emulate: fp8 numbers, but float32 products; slower than no fp8 at all")


def _part(name: str) -> str:
    return name.partition(".")[0]


def _fits(module: nn.Module, share: Share) -> bool:
    return all(size % (MULTIPLE * share.ranks) == 0 for size in module.get_parameter("weight").shape)


def _sizes(maps: Mapping[str, nn.Module]) -> str:
    """Names and sizes, layers that are alike as one."""
    sizes = {
        re.sub(r"\.\d+\.", ".*.", name): tuple(m.get_parameter("weight").shape) for name, m in maps.items()
    }
    return ", ".join(f"{name} {out} x {into}" for name, (out, into) in sizes.items())


def _require_rows(part: str, rows: int) -> None:
    """Raises ConfigError for rows that do not divide: the gradient of a weight is a product over them."""
    require(
        rows % MULTIPLE == 0,
        f"float8.recipe_name = rowwise: a forward of the {part} has {rows} rows on a rank, not a multiple of "
        f"{MULTIPLE}: change the sizes of a slot, or take rowwise_with_gw_hp",
    )
