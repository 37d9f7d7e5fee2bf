"""Which model a job trains: one answer for checks, estimates, training and scripts. Imports no torch."""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.vlm.config import PARTS, VLMJobConfig
from experiments.vlm.data.image_plan import PLANS, ImagePlan
from experiments.vlm.model import hf_config as hf
from experiments.vlm.model.config import ProjectorConfig, TilesConfig, VLMConfig
from experiments.vlm.model.families import FAMILIES as WHOLES
from experiments.vlm.model.families import family_in, family_of, kind_of
from experiments.vlm.model.families.family import as_processed
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model.towers import INSIDE, TOWERS, model_type_of
from torchtitan.components.checkpoint_folder import find, find_initial, read_record
from torchtitan.config.errors import ConfigError, did_you_mean, require
from torchtitan.config.table import from_table
from torchtitan.models.decoder.hf_config import FAMILIES
from torchtitan.models.hf.config_file import read_config
from torchtitan.tools.hub import get_it

DEFAULT = "debugmodel"
# Fields of a decoder that a row of sizes leaves open, or of which a file may have more.
OPEN = ("vocab_size", "context", "window", "model_type")


def model_config(job: VLMJobConfig) -> VLMConfig:
    """The model of the checkpoint that the job resumes, of model.flavor, or of what the job starts from.

    Raises ConfigError where there is no such model, where flavor and folders disagree, or where
    data.patch_size or data.spatial_merge_size is given and is not the model's.
    """
    name, row = job.model.flavor, None
    own = find(job.checkpoint, Path(job.job.dump_folder) / job.checkpoint.folder)
    if recorded := _recorded(own or (None if name else find_initial(job.checkpoint))):
        return _with_patches(recorded, job, merges=True)
    if name:
        require(name in FLAVORS, f"model.flavor = {name}: no such flavor{did_you_mean(name, FLAVORS)}")
        row = FLAVORS[name]
    # With a flavor the sizes are known before weights are there: for estimates and dry runs.
    folders = {} if row and missing_folders(job) else part_folders(job)
    config = _of_folders(folders, row, name) if folders else row or FLAVORS[DEFAULT]
    return _with_patches(config, job, merges="projector" in folders)


def image_plan(job: VLMJobConfig) -> ImagePlan:
    """The rule for the job's images. Raises ConfigError as model_config does."""
    return plan_of(model_config(job), job)


def plan_of(config: VLMConfig, job: VLMJobConfig) -> ImagePlan:
    """The rule for images where the model is known."""
    data, encoder = job.data, config.encoder
    resize = data.resize or config.resize
    require(resize in PLANS, f"data.resize = {resize}: no such image plan{did_you_mean(resize, PLANS)}")
    patch, merged = encoder.patch_size**2, config.projector.merge_size**2
    pixels = {"pixels": 1, "tokens": patch * merged, "patches": patch}
    limits = data.image_limit("min"), data.image_limit("max")
    least, most = (count * pixels[unit] for _, count, unit in limits)
    return ImagePlan(
        patch_size=encoder.patch_size,
        merge_size=config.projector.merge_size,
        min_patches=-(-least // patch),
        max_patches=most // patch // merged * merged,
        resize=resize,
        extra=encoder.extra_cells,
        extra_tokens=encoder.feature_extra,
        image_size=encoder.image_size,
        resample=encoder.resample,
        fill=tuple(int(255 * mean) for mean in encoder.mean),
        marked=family_of(config).marked,
        newline=config.projector.newline,
        cut=config.tiles,
        pixels=(least, most),
    )


def named_folders(job: VLMJobConfig) -> dict[str, Path]:
    """Option -> the Hugging Face folder that it names."""
    names = ("initial_load_path", "initial_load_encoder_path", "initial_load_decoder_path")
    paths = (
        {name: getattr(job.checkpoint, name) for name in names} if job.checkpoint.initial_load_in_hf else {}
    )
    return {f"checkpoint.{name}": Path(path).expanduser() for name, path in paths.items() if path}


def missing_folders(job: VLMJobConfig) -> list[str]:
    """A line for each named folder that is not here."""
    return [
        f"{option} = {folder}: no such folder (looked from {Path.cwd()}); {get_it(folder)}"
        for option, folder in named_folders(job).items()
        if not folder.is_dir()
    ]


def part_folders(job: VLMJobConfig) -> dict[str, Path]:
    """Part -> the Hugging Face folder that its weights start from. Parts without one start fresh.

    Raises ConfigError where a folder does not hold what it is named for.
    """
    c, named, missing = job.checkpoint, named_folders(job), missing_folders(job)
    nothing = "checkpoint.initial_load_in_hf needs checkpoint.initial_load_path, a Hugging Face folder"
    require(bool(named) or not c.initial_load_in_hf, nothing)
    require(not missing, "".join(missing[:1]))
    folders = {}
    for part in ("encoder", "decoder"):
        option = f"initial_load_{part}_path"
        needs = f"checkpoint.{option} needs checkpoint.initial_load_in_hf"
        require(c.initial_load_in_hf or not getattr(c, option), needs)
        if folder := named.get(f"checkpoint.{option}"):
            held = parts_in(folder)
            require(part in held, f"checkpoint.{option} = {folder}: holds the {held[0]} alone")
            folders[part] = folder
    if whole := named.get("checkpoint.initial_load_path"):
        left = [part for part in parts_in(whole) if part not in folders]
        key = f"checkpoint.initial_load_path = {whole}"
        require(bool(left), f"{key}: nothing of it is used, since its parts have folders of their own")
        folders |= dict.fromkeys(left, whole)
    if (tower := folders.get("encoder")) and (family := family_in(read_config(tower))):
        folders["encoder"] = family.tower_weights(tower)
    return folders


def parts_in(folder: Path) -> tuple[str, ...]:
    """The parts that a folder holds, by its config.json. Raises ConfigError for an unknown model."""
    file = read_config(folder)
    kind = file.model_type
    if kind_of(file):
        return PARTS
    towers = (*TOWERS, *INSIDE)
    known = ", ".join([*WHOLES, *towers, *FAMILIES])
    require(kind in towers or kind in FAMILIES, f"{file.where}: model_type = {kind!r}; known: {known}")
    return ("encoder",) if kind in towers else ("decoder",)


def _of_folders(folders: dict[str, Path], row: VLMConfig | None, flavor: str) -> VLMConfig:
    for part in ("encoder", "decoder"):
        fresh = f"nothing says which {part}: checkpoint.initial_load_{part}_path names a folder that has one"
        require(part in folders or row is not None, f"{fresh}, model.flavor sizes for a fresh one")
    found: dict[str, Any] = {}
    if "projector" in folders:
        whole = folders["projector"]
        file = read_config(whole)
        kind, tower = kind_of(file), hf.encoder_config(file)
        images = WHOLES[kind]
        found["projector"], found["family"] = hf.projector_config(file), images.read_as or kind
        found["resize"], found["tiles"] = images.resize(whole, tower), images.tiles(whole, file, tower)
    for part, read in (("encoder", hf.encoder_config), ("decoder", hf.decoder_config)):
        if part in folders:
            found[part] = read(read_config(folders[part]))
    if "encoder" in found:
        found["encoder"] = as_processed(found["encoder"], folders["encoder"])
        if "projector" in folders and model_type_of(tower) == model_type_of(found["encoder"]):
            # The whole model decides which features of the tower are read, wherever its weights come from.
            found["encoder"] = replace(
                found["encoder"],
                feature_layers=tower.feature_layers,
                feature_norm=tower.feature_norm,
                feature_extra=tower.feature_extra,
            )
    if row is None:
        found.setdefault("projector", ProjectorConfig(found["decoder"].dim))
        return VLMConfig(**found)
    for part in folders:
        sizes = found[part]
        _require_equal(getattr(row, part), sizes, f"model.flavor = {flavor}", folders[part])
    vocabulary = row.decoder.vocab_size
    if "decoder" in found:
        vocabulary = max(vocabulary, found["decoder"].vocab_size)
        found["decoder"] = replace(found["decoder"], vocab_size=vocabulary)
    return replace(row, **found)


def _require_equal(row: Any, found: Any, flavor: str, folder: Path) -> None:
    for field in dataclasses.fields(row):
        name = field.name
        ours, theirs = getattr(row, name), getattr(found, name)
        if name not in (*OPEN, "image_size") and ours != theirs:
            raise ConfigError(
                f"{flavor}: {name} is {ours}, but {theirs} in {folder}/config.json: leave the flavor unset"
            )


def _recorded(checkpoint: Path | None) -> VLMConfig | None:
    """The model of a checkpoint, where there is one and says it."""
    sizes = read_record(checkpoint).get("model") if checkpoint else None
    return None if sizes is None else from_table(VLMConfig, sizes, f"{checkpoint}: model")


def _with_patches(config: VLMConfig, job: VLMJobConfig, merges: bool) -> VLMConfig:
    """`merges`: its projector has weights for its merge_size; else the job chooses that and a newline."""
    data, patch, merge = job.data, config.encoder.patch_size, config.projector.merge_size
    asked = data.spatial_merge_size
    require(
        data.patch_size in (None, patch),
        f"data.patch_size = {data.patch_size}: {job.model.label} takes patches of {patch}; leave it unset",
    )
    require(
        not merges or asked in (None, merge),
        f"data.spatial_merge_size = {asked}: {job.model.label} merges {merge} x {merge} patches: unset it",
    )
    if asked is not None:
        config = replace(config, projector=replace(config.projector, merge_size=asked))
    if data.resize == "tiles" and not merges:
        config = replace(config, projector=replace(config.projector, newline=True))
    if data.max_tiles_per_image is not None:
        config = replace(config, tiles=_fewer_tiles(config.tiles, data.max_tiles_per_image))
    return config


def _fewer_tiles(tiles: TilesConfig, most: int) -> TilesConfig:
    counts = [math.prod(grid) for grid in tiles.grids]
    none = (
        f"data.max_tiles_per_image = {most}: the smallest grid has {min(counts)} tiles: use so many at least"
    )
    require(min(counts) <= most, none)
    kept = (grid for grid, count in zip(tiles.grids, counts, strict=True) if count <= most)
    return replace(tiles, grids=tuple(kept))
