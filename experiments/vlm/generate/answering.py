"""From a job to an engine with a model that is filled, and a maker of prompts for it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.vlm.batch import BatchShape
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.chat_template import ChatTemplate, ends_of, load_chat_template
from experiments.vlm.data.image import ImagePlan
from experiments.vlm.data.packing import Budget
from experiments.vlm.generate.forward import CachedVLM
from experiments.vlm.generate.layout import agreement, attach_cache, check_layout, parallelize_for_answers
from experiments.vlm.generate.prompt import Prompter
from experiments.vlm.model_config import model_config
from experiments.vlm.spec import SPEC
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.layout import degrees
from torchtitan.distributed.mesh import Mesh, build_mesh
from torchtitan.distributed.process_group import open_process_group, world_size
from torchtitan.generation.engine import Engine
from torchtitan.loaded_model import open_model


@dataclass(frozen=True)
class Answering:
    """What answers prompts: `engine`, and what makes them: `prompter`."""

    engine: Engine
    prompter: Prompter
    mesh: Mesh


def open_answering(
    job: VLMJobConfig,
    checkpoint: Path | None,
    chat_template: str,
    sequences: int,
    places: int,
    reuse: bool = False,
) -> Answering:
    """Fill the model and lay it out over the ranks that there are; a process group is opened.

    checkpoint: None where the job starts from a Hugging Face folder. chat_template: see load_chat_template;
    empty: the model knows no conversations. sequences, places: of the cache. Raises UserError.
    """
    template = load_chat_template(chat_template) if chat_template else None
    check_layout(degrees(job.parallelism, world_size()))
    tokenizer = SPEC.load_tokenizer(job)
    device = open_process_group(job.comm, Path(job.job.dump_folder))
    mesh = build_mesh(degrees(job.parallelism, world_size()), device)
    spec = replace(SPEC, parallelize=parallelize_for_answers)
    (model,) = open_model(job, spec, mesh, tokenizer, checkpoint).parts
    return over(model, mesh, job, tokenizer, template, sequences, places, reuse)


def over(
    model: Any,
    mesh: Mesh,
    job: VLMJobConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    sequences: int,
    places: int,
    reuse: bool = False,
) -> Answering:
    """The same of a model that is filled and laid out."""
    data, config = job.data, model_config(job)
    patch, merge = config.encoder.patch_size, config.projector.merge_size
    plan = ImagePlan(patch, merge, data.min_patches_per_image, data.max_patches_per_image, data.resize)
    cache = attach_cache(model, mesh, job, sequences, places)
    budget = Budget(places, data.patch_rows, data.patches_per_row)
    forward = CachedVLM(model, BatchShape(1, 0, data.patch_rows, data.patches_per_row, patch))
    engine = Engine(forward, cache, tokenizer, ends_of(tokenizer, template), agreement(mesh), reuse)
    return Answering(engine, Prompter(tokenizer, plan, budget, places, template), mesh)
