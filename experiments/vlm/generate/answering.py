"""From a job to an engine with the model's weights loaded, and a maker of prompts for it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.vlm.batch import BatchShape
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.chat_template import ChatTemplate, ends_of, load_chat_template
from experiments.vlm.data.packing import Budget
from experiments.vlm.generate.forward import WHOLE, CachedVLM, Share
from experiments.vlm.generate.layout import agreement, attach_cache, check_layout, parallelize_for_answers
from experiments.vlm.generate.prompt import Prompter
from experiments.vlm.model_config import image_plan
from experiments.vlm.processor import folder_ends
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.layout import degrees
from torchtitan.distributed.mesh import Mesh, build_mesh
from torchtitan.distributed.process_group import open_process_group, world_size
from torchtitan.generation.engine import Engine
from torchtitan.generation.kv_cache import KVCache
from torchtitan.loaded_model import open_model
from torchtitan.spec import TrainSpec

IMAGES = 16  # in tiles that a prompt may have, however few a slot of training holds


@dataclass(frozen=True)
class Answering:
    """What answers prompts: `engine`, and what makes them: `prompter`."""

    engine: Engine
    prompter: Prompter
    mesh: Mesh


def open_answering(
    job: VLMJobConfig,
    spec: TrainSpec,
    checkpoint: Path | None,
    chat_template: str,
    sequences: int,
    places: int,
    reuse: bool = False,
) -> Answering:
    """Build the model, lay it out over the ranks and load its weights; opens a process group.

    checkpoint: None where the job starts from a Hugging Face folder. chat_template: see load_chat_template;
    empty: the model was trained without conversations. sequences, places: sizes of the cache. Raises
    UserError.
    """
    sizes = degrees(job.parallelism, world_size())
    check_layout(sizes)
    tokenizer = spec.load_tokenizer(job)
    prompter = prompter_of(job, tokenizer, chat_template, places)
    published = checkpoint is None and bool(chat_template)
    ends = folder_ends(Path(job.checkpoint.initial_load_path)) if published else frozenset()
    mesh = build_mesh(sizes, open_process_group(job.comm, Path(job.job.dump_folder)))
    spec = replace(spec, parallelize=parallelize_for_answers)
    model: Any = open_model(job, spec, mesh, tokenizer, checkpoint).parts[0]
    cache = attach_cache(model, mesh, job, sequences, places)
    answering = answering_of(model, cache, prompter, mesh, reuse=reuse)
    answering.engine.ends |= ends
    return answering


def prompter_of(
    job: VLMJobConfig, tokenizer: Tokenizer, chat_template: str, places: int, sharers: int = 1
) -> Prompter:
    """Arguments as those of `open_answering`; `sharers`: as in Prompter. Raises UserError."""
    template: ChatTemplate | None = load_chat_template(chat_template) if chat_template else None
    plan, rows = image_plan(job), job.data.patch_rows
    if len(plan.largest) > 1:
        rows = max(rows, IMAGES * len(plan.largest))
    budget = Budget(places, rows, job.data.patches_per_row)
    return Prompter(tokenizer, plan, budget, places, template, sharers)


def answering_of(
    model: Any, cache: KVCache, prompter: Prompter, mesh: Mesh, reuse: bool = False, share: Share = WHOLE
) -> Answering:
    """`model` holds `cache`; share: see CachedVLM."""
    tokenizer, budget, plan = prompter.tokenizer, prompter.budget, prompter.plan
    shape = BatchShape(1, 0, budget.patch_rows, budget.patches_per_row, plan.patch_size, plan.mixes)
    forward = CachedVLM(model, shape, share)
    ends = ends_of(tokenizer, prompter.template)
    engine = Engine(forward, cache, tokenizer, ends, agreement(mesh), reuse, share.tokens.ranks)
    return Answering(engine, prompter, mesh)
