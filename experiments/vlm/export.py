"""A checkpoint as a Hugging Face folder: the whole model as its family (model/families), or a tower alone.

Stock transformers opens it without custom code.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.vlm.adapter import require_rank
from experiments.vlm.config import PARTS, VLMJobConfig
from experiments.vlm.model import hf_config as sizes
from experiments.vlm.model.config import VLMConfig
from experiments.vlm.model.families import family_of
from experiments.vlm.model.hf import part_rows
from experiments.vlm.model.towers import tower_of, write_encoder
from experiments.vlm.model.vlm import VLM
from experiments.vlm.model_config import model_config
from experiments.vlm.processor import write_language, write_processor
from torchtitan.components.checkpoint_read import require_sizes
from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.components.weights import shapes_of
from torchtitan.config.errors import require
from torchtitan.models.decoder import hf_config as decoder
from torchtitan.models.hf.config_file import CONFIG
from torchtitan.models.hf.export import SHARD_GB, Export
from torchtitan.tools.logging import warn_once

Part = Literal["all", "encoder", "decoder"]
TABLE = "decoder.tok_embeddings.weight"


def export(
    job: VLMJobConfig,
    checkpoint: Path,
    folder: Path,
    rank: int = 0,
    ranks: int = 1,
    *,
    part: Part = "all",
    dtype: torch.dtype | None = None,
    shard_gb: float = SHARD_GB,
    merge_adapters: bool = True,
) -> Export:
    """Write `part` of a checkpoint of the job into `folder`, which is there; each rank some of the files.

    dtype: of the weights; None: as stored, which is float32 after training. Adapters are merged or left out.
    Raises ConfigError where the checkpoint cannot be read, is of another model, or no processor does what the
    job does.
    """
    config = model_config(job)
    parts = PARTS if part == "all" else (part,)
    family = family_of(config) if part == "all" else None
    rows = [row for name in parts for row in part_rows(name, config.encoder, family)]
    scale = job.lora.alpha / max(1, job.lora.rank) if merge_adapters else None
    made = Export(checkpoint, parts, rows, dtype, scale)
    if merge_adapters:
        require_rank(job.lora, made.adapters, checkpoint)
    _require_model(config, made, parts)
    if rank == 0:
        _write_settings(job, config, made, folder, part)
    made.write(folder, shard_gb, rank, ranks)
    return made


def _require_model(config: VLMConfig, made: Export, parts: tuple[str, ...]) -> None:
    """What is stored are the weights of this model, neither more nor less."""
    vocab_size = made.stored[TABLE].shape[0] if TABLE in made.stored else config.decoder.vocab_size
    with torch.device("meta"):
        model = VLM(config, vocab_size, "sdpa", loss_chunk=1)
    wanted = {n: shape for n, shape in shapes_of(model).items() if n.partition(".")[0] in parts}
    stored = {name: tensor.shape for name, tensor in made.stored.items()}
    require_sizes(wanted, stored)
    more = [name for name in stored if name not in wanted]
    require(
        not more,
        f"checkpoint {made.checkpoint} has {more[0] if more else None}, which the model of the job has not",
    )


def _write_settings(job: VLMJobConfig, config: VLMConfig, made: Export, folder: Path, part: Part) -> None:
    """config.json, and what turns images and conversations into inputs."""
    values: dict[str, Any]
    if part == "encoder":
        values = {"architectures": [tower_of(config.encoder).architecture]} | write_encoder(config.encoder)
    else:
        rows, tokenizer = made.stored[TABLE].shape[0], load_tokenizer(job.model.tokenizer_path)
        if tokenizer.vocab_size > rows:
            ids = f"model.tokenizer_path = {job.model.tokenizer_path} has {tokenizer.vocab_size:,} ids"
            warn_once(f"{ids}, the model {rows:,} rows: some stand for nothing; is it the model's own?")
        ends = {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id}
        if part == "all":
            write_processor(job, folder)
            values = sizes.vlm_hf_config(config, rows, tokenizer.image_id)
            values["text_config"] |= ends
        else:
            write_language(job, folder)
            values = {"architectures": [decoder.architecture_of(config.decoder)]}
            values |= decoder.hf_config(config.decoder, rows) | ends
    name = str(made.dtype).removeprefix("torch.")
    written = values | {"dtype": name, "torch_dtype": name}  # both spellings, for older releases
    (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
