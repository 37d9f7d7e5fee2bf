"""From a job to an engine with a model that is filled, and a maker of prompts for it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.vlm.batch import BatchShape
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.chat_template import ends_of, load_chat_template
from experiments.vlm.data.packing import Budget
from experiments.vlm.data.setup import image_plan
from experiments.vlm.generate.forward import CachedVLM
from experiments.vlm.generate.layout import agreement, attach_cache, check_layout, parallelize_for_answers
from experiments.vlm.generate.prompt import Prompter
from experiments.vlm.spec import SPEC
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
    sizes = degrees(job.parallelism, world_size())
    check_layout(sizes)
    tokenizer, plan, data = SPEC.load_tokenizer(job), image_plan(job), job.data
    mesh = build_mesh(sizes, open_process_group(job.comm, Path(job.job.dump_folder)))
    spec = replace(SPEC, parallelize=parallelize_for_answers)
    model: Any = open_model(job, spec, mesh, tokenizer, checkpoint).parts[0]
    cache = attach_cache(model, mesh, job, sequences, places)
    shape = BatchShape(1, 0, data.patch_rows, data.patches_per_row, plan.patch_size)
    ends, agree = ends_of(tokenizer, template), agreement(mesh)
    engine = Engine(CachedVLM(model, shape), cache, tokenizer, ends, agree, reuse)
    budget = Budget(places, data.patch_rows, data.patches_per_row)
    return Answering(engine, Prompter(tokenizer, plan, budget, places, template), mesh)
