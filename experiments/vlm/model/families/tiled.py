"""What the LLaVAs whose images are cut into tiles have in common, in their words. Imports no torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, TilesConfig, VLMConfig
from experiments.vlm.model.families.family import RESAMPLE, read_image_processor
from experiments.vlm.model.families.llava import projector_config as read_projector
from experiments.vlm.model.families.llava import require_llava, require_sides, sides
from torchtitan.config.errors import require
from torchtitan.models.hf.config_file import ConfigFile

PARTS = "export its parts alone (--part)"


def projector_config(file: ConfigFile) -> ProjectorConfig:
    """LLaVA's, with a newline."""
    return replace(read_projector(file), newline=True)


def read_tiles(
    folder: Path, file: ConfigFile, encoder: EncoderConfig, default: TilesConfig, size: int, crops: bool
) -> TilesConfig:
    """How images are cut. `default`, `size`, `crops`: of the class and of its image processor, where files
    say nothing. Raises ConfigError where the processor and config.json differ.
    """
    strategy = "vision_feature_select_strategy = 'full': its class token has no place among rows of tiles"
    require(not encoder.feature_extra, f"{file.where}: {strategy}; no class of transformers computes that")
    made = replace(default, grids=_grids(file, encoder, default))
    processor = read_image_processor(folder)
    if processor is not None:
        found = {*sides(processor, "size", size).values()}
        if processor.get("do_center_crop", crops):
            found |= {*sides(processor, "crop_size", size).values()}
        require_sides(processor, found, encoder)
        cut = _grids(processor, encoder, default)
        other = f"{processor.where}: image_grid_pinpoints are not those of {file.where}: correct one of them"
        require(cut == made.grids, other)
    return made


def _grids(file: ConfigFile, encoder: EncoderConfig, default: TilesConfig) -> tuple[tuple[int, ...], ...]:
    pairs, side = file.values.get("image_grid_pinpoints"), encoder.image_size or 1
    if pairs is None:
        return default.grids
    said = f"{file.where}: image_grid_pinpoints = {pairs}"
    listed = isinstance(pairs, list) and pairs and all(isinstance(pair, list | tuple) for pair in pairs)
    whole = listed and all(type(n) is int and n > 0 and n % side == 0 for pair in pairs for n in pair)
    good = whole and all(len(pair) == 2 for pair in pairs)
    require(bool(good), f"{said}: expected [height, width] in multiples of the tower's {side} pixels")
    return tuple(tuple(n // side for n in pair) for pair in pairs)


def pinpoints(config: VLMConfig) -> list[list[int]]:
    """(height, width) in pixels of each grid."""
    return [[n * (config.encoder.image_size or 0) for n in grid] for grid in config.tiles.grids]


def require_tiled(config: VLMConfig, tiles: TilesConfig) -> None:
    """Raises ConfigError where its class does not compute what the model does. `tiles`: of its class."""
    require(
        config.projector.newline, f"{config.family} ends rows of tiles by a newline, this model not: {PARTS}"
    )
    require_llava(replace(config, projector=replace(config.projector, newline=False)))
    same = config.tiles.alone == tiles.alone and (config.tiles.most is None) == (tiles.most is None)
    require(same, f"{config.family} cuts images otherwise than this model: {PARTS}")


def image_processor(config: VLMConfig, plan: ImagePlan, kind: str) -> dict[str, Any]:
    """Its settings. Raises ConfigError for a plan without tiles, or with tiles of another size."""
    side, size = plan.side, config.encoder.image_size
    other = f"data.resize = {plan.resize}: the image processor of {config.family} makes tiles: {PARTS}"
    require(plan.resize == "tiles", other)
    small = f"tiles have {side} pixels a side here, and {size} in the image processor of {config.family}: "
    require(side == size, f"{small}raise data.max_patches_per_image")
    square = {"height": side, "width": side}
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_pad": True,
        "do_resize": True,
        "size": square,
        "resample": RESAMPLE[plan.resample],
        "image_grid_pinpoints": pinpoints(config),
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.encoder.mean),
        "image_std": list(config.encoder.deviation),
    }
