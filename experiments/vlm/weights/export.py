"""A checkpoint as a Hugging Face folder: the whole model as its family (model/families), or a tower alone.

Stock transformers opens it without custom code.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.vlm.config import PARTS, VLMJobConfig
from experiments.vlm.model.config import VLMConfig
from experiments.vlm.model.families import FAMILIES, family_of, llava_original
from experiments.vlm.model.families.family import Family
from experiments.vlm.model.hf import part_rows
from experiments.vlm.model.towers import tower_of, write_encoder
from experiments.vlm.model.vlm import VLM
from experiments.vlm.model_config import model_config
from experiments.vlm.processor import write_language, write_processor
from experiments.vlm.weights.adapter import require_rank
from experiments.vlm.weights.embedding_rows import rows_before_image
from torchtitan.components.checkpoint_read import require_sizes
from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.components.weights import shapes_of
from torchtitan.config.errors import require
from torchtitan.models import weight_names
from torchtitan.models.decoder import hf_config as decoder
from torchtitan.models.hf.config_file import CONFIG
from torchtitan.models.hf.export import Export
from torchtitan.models.hf.writing import SHARD_GB
from torchtitan.tools.disk import write_json
from torchtitan.tools.logging import warn_once

ExportPart = Literal["all", "encoder", "decoder"]
TABLE, _ = VLM.TOKEN_TABLES


def export(
    job: VLMJobConfig,
    checkpoint: Path,
    folder: Path,
    rank: int = 0,
    ranks: int = 1,
    *,
    part: ExportPart = "all",
    dtype: torch.dtype | None = None,
    shard_gb: float = SHARD_GB,
    merge_adapters: bool = True,
    layout: str = "",
    vision_tower: str = "",
) -> Export:
    """Write `part` of a checkpoint of the job into `folder`, which is there; each rank some of the files.

    dtype: of the weights; None: as stored, which is float32 after training. Adapters are merged or left out.
    layout: a family that a whole model is written as; empty: its own. vision_tower: what LLaVA's own layout
    calls the tower; empty: what one of its size was called.

    Raises ConfigError where the checkpoint cannot be read, is of another model, or no processor does what the
    job does.
    """
    config = model_config(job)
    parts = PARTS if part == "all" else (part,)
    family = (FAMILIES[layout] if layout else family_of(config)) if part == "all" else None
    rows = [row for name in parts for row in part_rows(name, config.encoder, family)]
    if family and not family.image_row:
        kept = weight_names.Part(first=0, last=rows_before_image(job))
        rows = [row._replace(ours_part=kept) if row.ours in VLM.TOKEN_TABLES else row for row in rows]
    scale = job.lora.alpha / max(1, job.lora.rank) if merge_adapters else None
    made = Export(checkpoint, parts, rows, dtype, scale)
    if merge_adapters:
        require_rank(job.lora, made.adapters, checkpoint)
    _require_model(config, made, parts)
    if rank == 0:
        values = _write_settings(job, config, made, folder, family, part)
        if vision_tower:
            values[llava_original.TOWER] = vision_tower
        unnamed = "no tower of this size was published: say with --vision_tower how config.json names it"
        require(values.get(llava_original.TOWER, "") is not None, unnamed)
        name = str(made.dtype).removeprefix("torch.")
        values |= {"dtype": name, "torch_dtype": name}  # both spellings, for older releases
        write_json(folder / CONFIG, values)
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


def _write_settings(
    job: VLMJobConfig, config: VLMConfig, made: Export, folder: Path, family: Family | None, part: ExportPart
) -> dict[str, Any]:
    """What turns images and conversations into inputs. Returns what config.json says."""
    if part == "encoder":
        return {"architectures": [tower_of(config.encoder).architecture]} | write_encoder(config.encoder)
    stored, tokenizer = made.stored[TABLE].shape[0], load_tokenizer(job.model.tokenizer_path)
    if tokenizer.vocab_size > stored:
        ids = f"model.tokenizer_path = {job.model.tokenizer_path} has {tokenizer.vocab_size:,} ids"
        warn_once(f"{ids}, the model {stored:,} rows: some stand for nothing; is it the model's own?")
    ends = {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id}
    if family is None:
        write_language(job, folder)
        alone: dict[str, Any] = {"architectures": [decoder.architecture_of(config.decoder)]}
        return alone | decoder.hf_config(config.decoder, stored) | ends
    write_processor(job, folder, family)
    as_read = replace(config, resize=job.data.resize or config.resize)
    rows = stored if family.image_row else min(stored, rows_before_image(job) or stored)
    values = family.write(as_read, rows, tokenizer.image_id)
    values.get("text_config", values).update(ends)
    return values
