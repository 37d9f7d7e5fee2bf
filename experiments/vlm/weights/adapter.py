"""Adapters ([lora]) as folders that peft writes and reads: adapter_config.json and adapter_model.safetensors.

Their names are those of the whole model as transformers has it, so they belong to its exported folder.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from experiments.vlm.config import PARTS
from experiments.vlm.model.config import VLMConfig
from experiments.vlm.model.families import family_of
from experiments.vlm.model.hf import part_rows
from torchtitan.components.checkpoint_read import (
    PREFIX,
    Sizes,
    Stored,
    reading,
    require_scale,
    stored_tensors,
)
from torchtitan.config.errors import ConfigError, require
from torchtitan.config.job import LoRA
from torchtitan.layers.lora import INFIX, is_adapters
from torchtitan.models.hf.match import Source
from torchtitan.models.hf.safetensors_file import StoredTensor, read_header
from torchtitan.models.hf.writing import TensorToWrite, write_file
from torchtitan.models.weight_names import Row, Transform, write
from torchtitan.tools.disk import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OF_PEFT = "base_model.model."
# What the factors alone cannot say: an adapter of ours computes nothing else.
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
}
# What says nothing of what is computed, or what the tensors say themselves. Any other key names a kind of
# adapter that is not here.
FREE = {
    *("r", "lora_alpha", "lora_dropout", "init_lora_weights", "target_modules", "exclude_modules"),
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version"),
    *("layers_pattern", "megatron_config", "megatron_core", "qalora_group_size", "trainable_token_indices"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "ensure_weight_tying"),
}
INITS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base as it is
PIXEL = Transform(lambda rows: rows.flatten(1), lambda rows: rows[..., None, None])


def adapter_rows(config: VLMConfig) -> list[Row]:
    """Names of the factors, from those of the maps that they adapt.

    peft calls a map as it is called in memory, where all stands below `model`; files of LLaVAs leave it out.
    What embeds patches may be a convolution there: then A has its kernel, and B one of a single pixel.
    """
    rows = [row for part in PARTS for row in part_rows(part, config.encoder, family_of(config))]
    rows.sort(key=lambda row: not row.theirs.startswith("model."))  # the first is the one written
    maps: dict[tuple[str, str], Transform] = {}
    for row in rows:
        maps.setdefault((row.theirs.rpartition(".")[0], row.ours.rpartition(".")[0]), row.transform)
    found, same = [], Transform()
    for (theirs, ours), change in maps.items():
        changes = {"A": change, "B": same if change.write is same.write else PIXEL}
        found += [
            Row(f"{OF_PEFT}{theirs}.lora_{factor}.weight", f"{ours}{INFIX}{factor}.weight", changed)
            for factor, changed in changes.items()
        ]
    return found


def write_adapter(
    checkpoint: Path, folder: Path, options: LoRA, config: VLMConfig, dtype: torch.dtype | None = None
) -> dict[str, TensorToWrite]:
    """The adapters of a checkpoint into `folder`, which is there. Returns them by their names in it.

    Raises Damaged, and ConfigError where the checkpoint has none or `dtype` does not hold a number of it.
    """
    stored = {name: tensor for name, tensor in stored_tensors(checkpoint).items() if name.startswith(PREFIX)}
    weights = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in stored.items() if is_adapters(name)}
    require(bool(weights), f"checkpoint {checkpoint} has no adapters ([lora])")
    require_rank(options, stored, checkpoint)
    with reading(checkpoint):
        dcp.load(weights, checkpoint_id=str(checkpoint), no_dist=True)
    ours = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    named = write(ours, adapter_rows(config))
    whole = {n: TensorToWrite(tuple(w.shape), dtype or w.dtype, partial(list, [w])) for n, w in named.items()}
    write_file(folder / WEIGHTS, whole)
    modules = sorted({name.removeprefix(OF_PEFT).partition(".lora_")[0] for name in named})
    settings = {
        **PLAIN,
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": modules,
    }
    write_json(folder / CONFIG, settings)
    return whole


def require_rank(options: LoRA, stored: Mapping[str, Stored], checkpoint: Path) -> None:
    """Raises ConfigError where the options are not those of the adapters that are stored."""
    for name, tensor in stored.items():
        if name.endswith(f"{INFIX}A.weight") and tensor.shape[0] != options.rank:
            raise ConfigError(
                f"lora.rank = {options.rank}: checkpoint {checkpoint} has adapters of rank {tensor.shape[0]}"
                "; give its --job.dump_folder, or --lora.rank and --lora.alpha as they were"
            )
    if any(map(is_adapters, stored)):
        require_scale(checkpoint, options.alpha / options.rank)


def adapter_source(options: LoRA, shapes: Sizes, config: VLMConfig) -> Source:
    """The folder lora.initial_load_path, for weights of these `shapes`.

    Raises ConfigError where it is no adapter of this kind.
    """
    folder = Path(options.initial_load_path)
    _require_same(folder / CONFIG, options)
    parts = dict.fromkeys(name.partition(".")[0] for name in shapes)
    return Source(folder, tuple(parts), adapter_rows(config), {}, tensors=_read_tensors)


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    return read_header(folder / WEIGHTS)


def _require_same(path: Path, options: LoRA) -> None:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    require(isinstance(config, dict), f"{path}: expected an object")
    for key, value in config.items():
        plain = PLAIN.get(key)
        same = key in FREE or value == plain or not (value or plain)
        require(same, f"{path}: {key} = {value}: only {plain} is known here")
    start = config.get("init_lora_weights")
    base = "these adapters belong to a base that peft changes first; let it save them as plain ones"
    require(start is None or start in INITS, f"{path}: init_lora_weights = {start}: {base}")
    for key, field in (("r", "rank"), ("lora_alpha", "alpha")):
        ours = getattr(options, field)
        require(config.get(key) == ours, f"lora.{field} = {ours}: {path} has {key} = {config.get(key)}")
