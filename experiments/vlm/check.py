"""Cross-checks of a vision-language job: patches, sources, towers.

They come after torchtitan/config/check.py's. Imports no torch.
"""

import glob
import os
import re
from collections import Counter
from pathlib import Path

from experiments.vlm.config import Source, VLMJobConfig
from experiments.vlm.data.chat_template import BUILT_IN as CHAT_TEMPLATES
from experiments.vlm.data.formats import FORMATS
from experiments.vlm.data.image_plan import PLANS, ImagePlan
from experiments.vlm.data.sources.permission import denied
from experiments.vlm.evaluate.tasks import parse_tasks
from experiments.vlm.model.config import EncoderConfig, VLMConfig
from experiments.vlm.model.families import FAMILIES
from experiments.vlm.model.flavors import ENCODERS
from experiments.vlm.model_config import missing_folders, model_config, part_folders, plan_of
from experiments.vlm.parallelism.sharing import rows_a_forward
from experiments.vlm.processor import processor_config
from experiments.vlm.world.shards import SPLITS, WORLDS
from torchtitan.components.checkpoint_folder import find
from torchtitan.config.check import RANGES as JOB_RANGES
from torchtitan.config.check import check, check_patterns, check_ranges, check_selective, is_allowed
from torchtitan.config.errors import did_you_mean, require
from torchtitan.config.float8 import check_torchao
from torchtitan.config.layout import Degrees, degrees
from torchtitan.models.decoder.check import check_decoder
from torchtitan.models.decoder.flavors import DECODERS
from torchtitan.models.hf.folder import read_tensors

RANGES = {
    "activation_checkpoint.encoder_full_layers": ">= 0",
    "activation_checkpoint.encoder_selective_layers": ">= 0",
    "data.epochs": ">= 0",
    "data.patches_per_row": ">= 1",
    "data.patch_rows": ">= 1",
    "data.max_patches_per_image": ">= 1",
    "data.min_patches_per_image": ">= 1",
    **{f"data.{m}_{unit}_per_image": ">= 1" for m in ("max", "min") for unit in ("pixels", "tokens")},
    "data.max_tiles_per_image": ">= 1",
    "data.patch_size": ">= 1",
    "data.spatial_merge_size": ">= 1",
    "data.packing_buffer_size": ">= 1",
    "data.num_workers": ">= 0",
    "data.decode_threads": ">= 1",
    "data.prefetch": ">= 0",
    "data.new_shards_freq": ">= 0",
    "data.max_bad_fraction": "> 0, <= 1",
    "data.cache_gb": "> 0",
    "data.storage_timeout_s": ">= 0",
    "data.url_timeout_s": "> 0",
    "validation.task_records": "-1 or >= 1",
    "validation.task_sequences": ">= 1",
    "validation.task_pictures": ">= 0",
}


def choices() -> dict[str, str]:
    """For help: section -> what its options choose from, where that is not in their types."""
    formats = f"Formats of sources: {', '.join(FORMATS)}."
    decoders = [name for name in DECODERS if name != "debug"]
    pairs = f"ENCODER-DECODER, of the encoders {', '.join(ENCODERS)} and the decoders {', '.join(decoders)}"
    whole = ", ".join(name for family in FAMILIES.values() for name in family.sizes)
    flavors, plans = f"Flavors: debugmodel, {whole}, or {pairs}.", f"Image plans: {', '.join(PLANS)}."
    return {"model": flavors, "data": f"{formats} {plans}", "validation": formats}


def check_vlm(job: VLMJobConfig, world_size: int) -> None:
    """Everything about the job that can be checked before torch is imported.

    Raises ConfigError for the first fault.
    """
    check(job, world_size)
    config, sizes = check_model(job), degrees(job.parallelism, world_size)
    check_encoder(job, config.encoder, sizes)
    check_decoder(config.decoder, job, sizes, job.parallelism.pipeline_parallel_encoder_stage)
    check_weights(job)
    if job.checkpoint.last_save_in_hf:
        processor_config(job)  # raises here what it would raise after the last step
    check_sources(job)
    check_tasks(job, sizes)


def check_estimated(job: VLMJobConfig) -> None:
    """What an estimate needs to be right: neither data nor devices; it checks the layout itself."""
    check_ranges(job, JOB_RANGES)
    check_torchao(job)
    check_selective(job)
    check_patterns(job)
    check_model(job)


def check_model(job: VLMJobConfig) -> VLMConfig:
    """The model, and what it asks of the job but for data and devices. Raises ConfigError."""
    check_ranges(job, RANGES)
    config = model_config(job)
    check_patches(job, config)
    check_recomputation(job, config)
    return config


def check_recomputation(job: VLMJobConfig, config: VLMConfig) -> None:
    """A tower recomputes no more layers than it runs."""
    ac, runs = job.activation_checkpoint, max(config.encoder.feature_depths)
    for tower, prefix, of, layers in (
        ("encoder", "encoder_", ac.encoder, runs),
        ("decoder", "", ac.decoder, config.decoder.layers),
    ):
        require(
            of.until <= layers,
            f"activation_checkpoint.{prefix}full_layers and {prefix}selective_layers = {of.full_layers} and "
            f"{of.selective_layers}: more than the {layers} layers that the {tower} runs",
        )


def check_weights(job: VLMJobConfig) -> None:
    """Files of weights to start from are there and whole, by their headers. Not needed by a dry run of a
    flavor, nor by a resumed run.
    """
    goes_on = find(job.checkpoint, Path(job.job.dump_folder) / job.checkpoint.folder)
    if goes_on or (job.job.dry_run and job.model.flavor and missing_folders(job)):
        return
    for folder in dict.fromkeys(part_folders(job).values()):
        read_tensors(folder)


def check_patches(job: VLMJobConfig, config: VLMConfig) -> None:
    """The budget of a row, the largest image in it, and the visual tokens of that image in a slot."""
    d, length, plan = job.data, job.training.seq_len, plan_of(config, job)
    square = config.projector.merge_size**2
    for key in ("patches_per_row", "max_patches_per_image"):
        value = getattr(d, key)
        fitting = max(1, value // square) * square
        wrong = f"data.{key} = {value} is not a multiple of data.spatial_merge_size squared ({square})"
        require(value % square == 0, f"{wrong}: use {fitting} or {fitting + square}")
    check_limits(job, plan)
    option, most, _ = d.image_limit("max")
    largest = f"{option} = {most}"
    row = f"a row holds (data.patches_per_row = {d.patches_per_row})"
    if plan.resize == "native":
        require(plan.max_patches <= d.patches_per_row, f"{largest} is more than {row}")
        extra = f"{plan.extra_cells} cells of the encoder's class token and registers"
        require(plan.most_cells <= d.patches_per_row, f"{largest} and {extra} are more than {row}")
    else:
        made = f"data.resize = {plan.resize}: a square of {plan.side} pixels takes {plan.most_cells} patches"
        require(plan.most_cells <= d.patches_per_row, f"{made}, more than {row}")
    require(
        not plan.extra_tokens or square == 1,
        "class token and registers are visual tokens here, which patches must not merge with: "
        "data.spatial_merge_size must be 1",
    )
    check_views(job, plan)
    needed, patches = plan.most_tokens, plan.most_cells - plan.extra_cells
    more = needed - patches // square  # begin, end and the like
    made = largest if plan.resize == "native" else f"a square of {plan.side} pixels"
    require(
        needed <= length,
        f"{made} makes {needed} tokens{' with begin and end of image' * plan.marked}, more than "
        f"training.seq_len = {length}: use data.max_patches_per_image of at most "
        f"{max(0, length - more) * square}",
    )


def check_limits(job: VLMJobConfig, plan: ImagePlan) -> None:
    """The least and the most of an image are each given once, hold a visual token, and are in order."""
    (low, least, _), (high, most, _) = (job.data.image_limit(which) for which in ("min", "max"))
    for which in ("min", "max"):
        pixels, tokens = (f"{which}_{unit}_per_image" for unit in ("pixels", "tokens"))
        both = getattr(job.data, pixels) is not None and getattr(job.data, tokens) is not None
        require(not both, f"data.{pixels} and data.{tokens} say the same: give one of them")
    side = plan.patch_size * plan.merge_size
    small = f"{high} = {most}: less than a visual token, which is {side} x {side} pixels"
    require(plan.max_patches > 0, small)
    require(plan.limits[0] <= plan.limits[1], f"{low} = {least} is more than {high} = {most}")


def check_views(job: VLMJobConfig, plan: ImagePlan) -> None:
    """A slot has room for an image of as many views and tokens as there can be."""
    d, key, views = job.data, f"data.resize = {plan.resize}", plan.largest
    tiles = "data.max_tiles_per_image"
    require(plan.resize == "tiles" or d.max_tiles_per_image is None, f"{tiles}: {key} makes none: unset it")
    if len(views) == 1:
        return
    cells, most = views[0], plan.most_tokens
    rows = -(-len(views) // (d.patches_per_row // cells))
    require(
        rows <= d.patch_rows,
        f"{key}: an image has up to {len(views)} views of {cells} patches, which patch_rows = "
        f"{d.patch_rows} of data.patches_per_row = {d.patches_per_row} do not hold: use patch_rows = {rows}, "
        f"or rows of {sum(views)}, or lower {tiles}",
    )
    require(not plan.extra_tokens, f"{key}: class token and registers cannot be visual tokens of tiles")
    length = job.training.seq_len
    long = f"{key}: an image has up to {most} tokens, more than training.seq_len = {length}"
    require(most <= length, f"{long}: use {most} or more, or lower {tiles}")


def check_encoder(job: VLMJobConfig, encoder: EncoderConfig, sizes: Degrees) -> None:
    """How the ranks of a context- and tensor-parallel group share the encoder."""
    p, ranks = job.parallelism, sizes.cp * sizes.tp
    rows = rows_a_forward(job, sizes)
    require(
        p.encoder_sharing != "on" or rows % ranks == 0,
        f"parallelism.encoder_sharing = on: {rows} patch rows a forward (slots * data.patch_rows) do not "
        f"divide among {ranks} ranks; "
        f"use auto, or change data.patch_rows",
    )
    stage = "parallelism.pipeline_parallel_encoder_stage needs parallelism.pipeline_parallel_degree > 1"
    require(sizes.pp > 1 or not p.pipeline_parallel_encoder_stage, stage)
    if not p.encoder_tensor_parallel:
        return
    key = "parallelism.encoder_tensor_parallel"
    require(sizes.tp > 1, f"{key} needs parallelism.tensor_parallel_degree > 1")
    require(
        p.encoder_sharing != "on",
        f"{key} shards heads, parallelism.encoder_sharing = on shards rows: choose one",
    )
    for count, what in ((encoder.heads, "heads"), (encoder.mlp_dim, "columns of the MLP")):
        require(count % sizes.tp == 0, f"{key}: {sizes.tp} ranks do not divide the encoder's {count} {what}")


def check_sources(job: VLMJobConfig) -> None:
    """Training data are named in one of two ways, and all that will be read are there (a dry run needs none).

    Raises ConfigError.
    """
    dataset, path, listed = job.training.dataset, job.training.dataset_path, job.data.sources
    if dataset or path:
        others = len(listed) > 1 or any(source.format or source.path for source in listed)
        require(not others, "training.dataset and data.sources are both given: keep one of them")
        require(
            bool(dataset), f"training.dataset is missing: which format is training.dataset_path = {path}?"
        )
        require(bool(path), f"training.dataset_path is missing: where is training.dataset = {dataset}?")
        _check_format(dataset, "training.dataset")
        check_reading(job.training_sources()[0], "data.sources[0]")
    else:
        require(
            bool(listed),
            "data.sources is empty: add [[data.sources]] tables, or --training.dataset and "
            "--training.dataset_path",
        )
        check_list(listed, "data.sources")
    if job.validation.enable:  # else nobody reads them, and they need not be on this machine
        require(
            bool(job.validation.sources),
            "validation.sources is empty: validation.enable needs [[validation.sources]]",
        )
        check_list(job.validation.sources, "validation.sources")
    for key, path in paths_of(job).items():
        check_path(path, key, needed=not job.job.dry_run)


def check_tasks(job: VLMJobConfig, sizes: Degrees) -> None:
    """Tasks are known, and can be answered under this layout. Records are checked when they are read.

    Raises ConfigError.
    """
    if parse_tasks(job.validation.tasks, "validation.tasks = "):
        require(job.validation.enable, "validation.tasks needs validation.enable")
        require(
            sizes.pp == 1,
            f"validation.tasks: with parallelism.pipeline_parallel_degree = {sizes.pp} no rank can answer, "
            "since each holds a part of the model: leave them out, and evaluate a checkpoint",
        )


def paths_of(job: VLMJobConfig) -> dict[str, str]:
    """Option -> the path that it names, of all data that will be read."""
    if job.training.dataset_path:
        paths = {"training.dataset_path": job.training.dataset_path}
    else:
        paths = {f"data.sources[{i}].path": source.path for i, source in enumerate(job.data.sources)}
    if job.validation.enable:
        listed = enumerate(job.validation.sources)
        paths |= {f"validation.sources[{i}].path": source.path for i, source in listed}
        asked = parse_tasks(job.validation.tasks, "validation.tasks = ")
        paths |= {f"validation.tasks[{i}]": each.path for i, each in enumerate(asked)}
    return paths


def missing_data(job: VLMJobConfig) -> list[str]:
    """A line for each path of data that is not here; what is remote counts as here."""
    return [line for key, path in paths_of(job).items() if (line := missing_path(path, key))]


def check_list(sources: list[Source], key: str) -> None:
    """`key`: the list's name, for the error. Raises ConfigError."""
    for number, source in enumerate(sources):
        _check_source(source, f"{key}[{number}]")
    repeated = [
        name
        for name, times in Counter(source.name or source.format for source in sources).items()
        if times > 1
    ]
    require(not repeated, f"{key}: two sources have the name {', '.join(repeated)}; give each its own")


def _check_source(source: Source, key: str) -> None:
    require(bool(source.format), f"{key}.format is missing")
    require(bool(source.path), f"{key}.path is missing")
    _check_format(source.format, f"{key}.format")
    check_reading(source, key)


def check_reading(source: Source, key: str) -> None:
    """Weight, shuffling, columns and chat template of a source. Raises ConfigError."""
    require(is_allowed(source.weight, "> 0"), f"{key}.weight = {source.weight}: must be > 0")
    require(source.shuffle_buffer >= 1, f"{key}.shuffle_buffer = {source.shuffle_buffer}: must be >= 1")
    require(
        bool(FORMATS[source.format].images) or not source.columns.image,
        f"{key}.columns.image = {source.columns.image}: format {source.format} has no images",
    )
    template = source.chat_template
    known = template in CHAT_TEMPLATES or os.path.isfile(os.path.expanduser(template))
    require(known, f"{key}.chat_template = {template}: neither a file nor one of {', '.join(CHAT_TEMPLATES)}")


def _check_format(name: str, key: str) -> None:
    require(name in FORMATS, f"{key} = {name}: no such format{did_you_mean(name, FORMATS)}")


def check_path(path: str, key: str, needed: bool = True) -> None:
    """It may be read, and at least one local file is there where data are `needed`. Raises ConfigError.

    The reader finds out which shards of a range are missing, and what is remote.
    """
    if path.startswith("embedded:"):
        worlds = [f"embedded:{world}/{split}" for world in WORLDS for split in SPLITS]
        require(path in worlds, f"{key} = {path}: no such embedded data{did_you_mean(path, worlds)}")
    elif "://" not in path:
        unreadable = denied(_pattern(path))
        require(unreadable is None, f"{key} = {path}: permission denied: {unreadable}")
        missing = missing_path(path, key)
        require(not (needed and missing), missing)


def missing_path(path: str, key: str) -> str:
    """What to say of a path that matches no file or folder of this machine; else nothing."""
    if "://" in path or path.startswith("embedded:") or os.path.exists(path):
        return ""
    if next(glob.iglob(_pattern(path), recursive=True), None) is not None:
        return ""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", path)
    hub = f"; a data set of the Hugging Face hub is hf://datasets/{path}" if named else ""
    return f"{key} = {path}: no such file or folder (looked from {os.getcwd()}){hub}"


def _pattern(path: str) -> str:
    """A glob for a brace range."""
    return re.sub(r"\{[^{}]*\}", "*", os.path.expanduser(path))


def check_output(path: str, key: str) -> None:
    """A file can be written there; an empty path asks for none."""
    folder = os.path.dirname(os.path.abspath(path))
    require(not path or os.path.isdir(folder), f"{key} = {path}: no such folder (looked from {os.getcwd()})")
    require(not os.path.isdir(path), f"{key} = {path}: is a folder; name a file")
