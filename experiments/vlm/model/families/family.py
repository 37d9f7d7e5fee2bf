"""What a class of whole vision-language models says of itself. Imports no torch."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.model.config import (
    EncoderConfig,
    ProjectorConfig,
    Resample,
    TilesConfig,
    VLMConfig,
)
from torchtitan.config.errors import ConfigError, require
from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.models.hf.config_file import ConfigFile
from torchtitan.models.weight_names import Row

PROJECTOR = (
    Row("layer_norm.*", "norm.*"),
    Row("linear_1.*", "linear_1.*"),
    Row("linear_2.*", "linear_2.*"),
)
# Pillow's numbers, which image processors say
RESAMPLE: dict[Resample, int] = {"bilinear": 2, "bicubic": 3}


def _no_tiles(folder: Path, file: ConfigFile, encoder: EncoderConfig) -> TilesConfig:
    return TilesConfig()


@dataclass(frozen=True)
class Family:
    """A class of transformers. It reads a config.json, and raises ConfigError for what we have not."""

    encoder: Callable[[ConfigFile], EncoderConfig]
    projector: Callable[[ConfigFile], ProjectorConfig]
    decoder: Callable[[ConfigFile], DecoderConfig]
    resize: Callable[[Path, EncoderConfig], str]  # how a folder's images are made to fit
    require: Callable[[VLMConfig], None]  # raises ConfigError for a model that its class does not compute
    # (config, rows of the embedding, id of an image) -> config.json of a model that its class computes
    write: Callable[[VLMConfig, int, int], dict[str, Any]]
    # (config, plan) -> processor_config.json; raises ConfigError where its processor does otherwise
    processor: Callable[[VLMConfig, ImagePlan], dict[str, Any]]
    tower: Callable[[EncoderConfig], str]  # model_type of the tower whose names of weights its files use
    # part -> where it stands in files; the first is where it is written
    places: Mapping[str, tuple[str, ...]]
    heads: tuple[str, ...] = ("",)  # what stands there before lm_head
    newline: tuple[str, ...] = ()  # what the vector behind a row of tiles is called there
    # how images are cut, by a folder's config.json and its image processor
    tiles: Callable[[Path, ConfigFile, EncoderConfig], TilesConfig] = _no_tiles
    projector_rows: Sequence[Row] = PROJECTOR  # names of its weights
    # where the tower's weights are, by the folder of the whole; raises ConfigError where they are not here
    tower_weights: Callable[[Path], Path] = lambda folder: folder
    read_as: str = ""  # the family of the models that its files hold; empty: itself
    image_row: bool = True  # an image has a row of the embedding
    marked: bool = True  # an image has a begin and an end among the tokens
    sizes: Mapping[str, VLMConfig] = field(default_factory=dict)  # flavors


def read_image_processor(folder: Path) -> ConfigFile | None:
    """The settings of a folder's image processor; None where it has no file. Raises ConfigError for a file
    that is no processor's.

    Folders of transformers 4 have a file of its own, beside one that says how tokens are counted.
    """
    whole, own = (_read_object(folder / f"{name}_config.json") for name in ("processor", "preprocessor"))
    if whole and whole.values.get("image_processor") is not None:
        return replace(whole.section("image_processor"), where=whole.where)
    return own


def _read_object(path: Path) -> ConfigFile | None:
    """None where it is not there."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    require(isinstance(values, dict), f"{path}: expected an object")
    return ConfigFile(values, str(path))


def as_processed(encoder: EncoderConfig, folder: Path) -> EncoderConfig:
    """The tower with the colours and kernel of the folder's image processor. Raises ConfigError."""
    file = read_image_processor(folder)
    if file is None:
        return encoder
    for key in ("do_resize", "do_rescale", "do_normalize"):
        file.refuse_all_but(key, True)
    factor = file.get("rescale_factor", 1 / 255)
    between = f"{file.where}: rescale_factor = {factor}: not supported here, only 1/255"
    require(math.isclose(factor, 1 / 255, rel_tol=1e-6), between)
    kernels = {number: kernel for kernel, number in RESAMPLE.items()}
    resample = file.get("resample", RESAMPLE[encoder.resample])
    known = ", ".join(f"{number} ({kernel})" for number, kernel in kernels.items())
    require(resample in kernels, f"{file.where}: resample = {resample}: not supported here, only {known}")
    mean, deviation = _colour(file, "image_mean", encoder.mean), _colour(file, "image_std", encoder.deviation)
    require(all(deviation), f"{file.where}: image_std = {list(deviation)}: nothing can be divided by 0")
    return replace(encoder, mean=mean, deviation=deviation, resample=kernels[resample])


def _colour(file: ConfigFile, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    values = file.values.get(key)
    if values is None:
        return default
    good = isinstance(values, list) and len(values) == 3 and all(type(v) in (int, float) for v in values)
    require(good, f"{file.where}: {key} = {values!r}: expected three numbers, of red, green and blue")
    return tuple(map(float, values))
