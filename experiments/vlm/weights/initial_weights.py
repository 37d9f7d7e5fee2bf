"""The weights that a job starts from, where Hugging Face folders hold them."""

from pathlib import Path

import torch
from torch import nn

from experiments.vlm.config import PARTS, VLMJobConfig
from experiments.vlm.model.families import family_in
from experiments.vlm.model.hf import left_over, part_rows
from experiments.vlm.model.hf_config import decoder_config, encoder_config
from experiments.vlm.model.vlm import VLM
from experiments.vlm.model_config import missing_folders, model_config, part_folders
from experiments.vlm.weights.adapter import adapter_source
from experiments.vlm.weights.embedding_rows import rows_of
from torchtitan.components.checkpoint_read import Sizes
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.components.train_state import as_record
from torchtitan.components.weights import shapes_of
from torchtitan.layers.lora import is_adapters
from torchtitan.models.hf.checkpoint import write_checkpoint
from torchtitan.models.hf.config_file import read_config
from torchtitan.models.hf.match import Source, match
from torchtitan.models.hf.source import FolderSource
from torchtitan.tools.logging import warn_once

TABLE, OUTPUT = VLM.TOKEN_TABLES


def initial_weights(job: VLMJobConfig, shapes: Sizes) -> FolderSource | None:
    """Compared with the model's `shapes`; None where the job names no folder.

    Raises ConfigError that names tensor and file.
    """
    if job.job.dry_run and (missing := missing_folders(job)):
        for line in missing:
            warn_once(f"{line}; so no weights were compared with the model")
        return None
    folders, allow = part_folders(job), job.checkpoint.initial_load_allow
    tied = bool(folders) and model_config(job).decoder.tied_embeddings
    # No folder of a model has adapters; they have one of their own, or start anew.
    adapters = {name: shape for name, shape in shapes.items() if is_adapters(name)}
    base = {name: shape for name, shape in shapes.items() if name not in adapters}
    matched = [
        match(source_of(folder, [p for p in folders if folders[p] == folder], tied), base, allow)
        for folder in dict.fromkeys(folders.values())
    ]
    if job.lora.initial_load_path:
        matched.append(match(adapter_source(job.lora, adapters, model_config(job)), adapters, allow))
    fresh = [part for part in PARTS if part not in folders] if folders else []
    return FolderSource(matched, fresh) if matched else None


def as_checkpoint(job: VLMJobConfig, tokenizer: Tokenizer | None, folder: Path) -> list[str]:
    """Write the weights that the job starts from, fresh ones too, as a checkpoint into `folder`, which is
    there. Returns the report. Raises ConfigError as `initial_weights` does.
    """
    config = model_config(job)
    with torch.device("meta"):
        model = VLM(config, rows_of(job, tokenizer), "sdpa", job.training.loss_chunk_tokens)
    source = initial_weights(job, shapes_of(model))
    assert source is not None, "the command asks for folders"
    fresh = {name: p for name, p in model.named_parameters() if name not in source.names}
    for name, parameter in fresh.items():
        module, _, own = name.rpartition(".")
        fresh[name] = nn.Parameter(torch.empty(parameter.shape))
        setattr(model.get_submodule(module), own, fresh[name])
    model.init_weights(job.debug.seed, without=source.names)
    values = {name: parameter.detach() for name, parameter in fresh.items()}
    write_checkpoint(source, values, as_record(config), folder)
    return source.report()


def source_of(folder: Path, parts: list[str], tied: bool) -> Source:
    """What is taken from a folder. `tied`: the output layer is the embedding."""
    file = read_config(folder)
    family = family_in(file)
    vocab_size = decoder_config(file).vocab_size if "decoder" in parts else 0
    encoder = encoder_config(file) if "encoder" in parts else None
    return Source(
        folder,
        tuple(parts),
        [row for part in parts for row in part_rows(part, encoder, family)],
        left_over(parts, encoder),
        tables=dict.fromkeys(VLM.TOKEN_TABLES, vocab_size),
        tied={OUTPUT: TABLE} if tied else {},
    )
