"""Adapters ([lora]) as folders that peft writes and reads: adapter_config.json and adapter_model.safetensors.

Their names are those of the whole model as transformers has it, so they belong to its exported folder.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from experiments.vlm.config import PARTS
from experiments.vlm.model.config import VLMConfig
from experiments.vlm.model.families import family_of
from experiments.vlm.model.hf import part_rows
from torchtitan.components.checkpoint_read import PREFIX, Sizes, Stored, reading, stored_tensors
from torchtitan.config.errors import ConfigError, require
from torchtitan.config.job import LoRA
from torchtitan.layers.lora import INFIX, is_adapters
from torchtitan.models.hf.match import Source
from torchtitan.models.hf.safetensors_file import StoredTensor, header_bytes, read_header
from torchtitan.models.hf.tensors import NAMES
from torchtitan.models.weight_names import Row, write

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


def adapter_rows(config: VLMConfig) -> list[Row]:
    """Names of the factors, from those of the maps that they adapt."""
    rows = [row for part in PARTS for row in part_rows(part, config.encoder, family_of(config))]
    maps = dict.fromkeys((row.theirs.rpartition(".")[0], row.ours.rpartition(".")[0]) for row in rows)
    return [
        Row(f"{OF_PEFT}{theirs}.lora_{factor}.weight", f"{ours}{INFIX}{factor}.weight")
        for theirs, ours in maps
        for factor in "AB"
    ]


def write_adapter(
    checkpoint: Path, folder: Path, options: LoRA, config: VLMConfig, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The adapters of a checkpoint into `folder`, which is there. Returns them by their names in it.

    Raises Damaged, and ConfigError where the checkpoint has none.
    """
    stored = {name: tensor for name, tensor in stored_tensors(checkpoint).items() if name.startswith(PREFIX)}
    weights = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in stored.items() if is_adapters(name)}
    require(bool(weights), f"checkpoint {checkpoint} has no adapters ([lora])")
    require_rank(options, stored, checkpoint)
    with reading(checkpoint):
        dcp.load(weights, checkpoint_id=str(checkpoint), no_dist=True)
    ours = {name.removeprefix(PREFIX): weight.to(dtype or weight.dtype) for name, weight in weights.items()}
    named = write(ours, adapter_rows(config))
    with (folder / WEIGHTS).open("wb") as file:
        file.write(header_bytes({name: (NAMES[w.dtype], tuple(w.shape)) for name, w in named.items()}))
        for weight in named.values():
            file.write(memoryview(weight.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
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
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return named


def require_rank(options: LoRA, stored: Mapping[str, Stored], checkpoint: Path) -> None:
    """Raises ConfigError where the options are not those of the adapters that are stored."""
    for name, tensor in stored.items():
        if name.endswith(f"{INFIX}A.weight") and tensor.shape[0] != options.rank:
            raise ConfigError(
                f"lora.rank = {options.rank}: checkpoint {checkpoint} has adapters of rank {tensor.shape[0]}"
                "; give its --job.dump_folder, or --lora.rank and --lora.alpha as they were"
            )


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
    for key, plain in PLAIN.items():
        value = config.get(key, plain)
        same = value == plain or not (value or plain)
        require(same, f"{path}: {key} = {value}: only {plain} is known here")
    for key, field in (("r", "rank"), ("lora_alpha", "alpha")):
        ours = getattr(options, field)
        require(config.get(key) == ours, f"lora.{field} = {ours}: {path} has {key} = {config.get(key)}")
