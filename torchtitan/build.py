"""A job becomes the parts of a run, one small step after the other."""

import dataclasses
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torchtitan.components.checkpoint import Checkpointer
from torchtitan.components.checkpoint_folder import find, read_record
from torchtitan.components.float8 import log_float8, require_device
from torchtitan.components.forward_backward import ForwardBackward
from torchtitan.components.freezing import choose_trained, rows_of
from torchtitan.components.loader import Batch, Loader, Tensors, to_device
from torchtitan.components.lr_scheduler import Schedule, fit_warmup
from torchtitan.components.memory_check import held_gib, require_room
from torchtitan.components.metrics import Counts, MetricsMeter, Reporter
from torchtitan.components.optimizer import Optimizers
from torchtitan.components.parameter_groups import settings
from torchtitan.components.saved_config import save_config
from torchtitan.components.train_state import TrainState
from torchtitan.components.validation import Tasks, Validator
from torchtitan.components.weights import shapes_of
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import JobConfig
from torchtitan.config.layout import BatchSizes, degrees, resolve_batch
from torchtitan.distributed.collectives import agree_on_data, any_rank, from_first_rank, wait_together
from torchtitan.distributed.mesh import Mesh, build_mesh
from torchtitan.distributed.slot_group import slot_group
from torchtitan.layers.lora import scale_of
from torchtitan.loaded_model import give_weights, parallelize
from torchtitan.spec import TrainSpec
from torchtitan.tools.logging import logger
from torchtitan.tools.profiling import Profiler


@dataclass
class Run:
    """Everything that training needs, built."""

    job: JobConfig
    spec: TrainSpec
    mesh: Mesh
    sizes: BatchSizes
    forward_backward: ForwardBackward
    to_rank: Callable[[Batch], Tensors]
    flops: Callable[[Batch], int]
    counts: Counts
    state: TrainState
    checkpointer: Checkpointer
    validator: Validator
    tasks: Tasks | None
    meter: MetricsMeter
    reporter: Reporter
    profiler: Profiler


def build(job: JobConfig, spec: TrainSpec, device: torch.device) -> Run:
    """What is cheap and may be wrong is built first, what a checkpoint fills before it is loaded."""
    world_size = dist.get_world_size()
    require_device(job.float8, device)
    _seed_generators(job)
    resolve_options(job)
    sizes = resolve_batch(job, world_size)
    mesh = build_mesh(degrees(job.parallelism, world_size), device)
    tokenizer = spec.load_tokenizer(job)
    spec.fit_memory(job, mesh.degrees, tokenizer)
    share = mesh.data.get_local_rank(), mesh.data.size()
    tasks = wait_together(lambda: spec.open_tasks(job, tokenizer, *share))
    model = spec.build_model(job, tokenizer)
    choose_trained(model, job.training)
    setting_of = settings(model, job.optimizer, rows_of(job.training.trainable_tokens, tokenizer))
    source = None if own_checkpoint(job) else spec.initial_weights(job, shapes_of(model))
    flops = spec.flops(job, model)
    log_sizes(model, spec, sizes)
    log_float8(model, job.float8)
    require_room(held_gib(model, job, mesh.degrees), job, device)
    open_loader = loader_of(job, spec, tokenizer, mesh)
    loader, held_out = open_loader("train", None), partial(open_loader, "validation")
    forward_backward = parallelize(model, mesh, job, spec)
    give_weights(forward_backward, model, job, mesh, source)
    parts = forward_backward.parts
    rates_on = device if job.compile.cuda_graphs else None
    optimizers = Optimizers(parts, job.optimizer, setting_of, model.ADAMW_ONLY, rates_on)
    state = TrainState(
        parts=parts,
        optimizers=optimizers,
        schedule=Schedule(optimizers, job.training.steps, job.lr_scheduler),
        loader=loader,
        aliases=model.tied_names(),
        global_batch_size=sizes.global_,
        model_config=spec.model_config(job),
        adapter_scale=scale_of(model),
        stages=mesh["pp"].get_group(),
    )
    checkpointer = load_checkpoint(job, state)
    to_rank, counts = to_rank_of(job, spec, mesh), spec.counts(job)
    shares = ("right", "exact", *spec.scoring.groups)
    return Run(
        job=job,
        spec=spec,
        mesh=mesh,
        sizes=sizes,
        forward_backward=forward_backward,
        to_rank=to_rank,
        flops=flops,
        counts=counts,
        state=state,
        checkpointer=checkpointer,
        validator=Validator(
            forward_backward, mesh, held_out, to_rank, spec.scoring, counts.held_out, job.validation.steps
        ),
        tasks=tasks,
        meter=MetricsMeter(device, world_size, counts),
        reporter=Reporter(job, tuple(counts.capacity), shares, state.step, dist.get_rank(), world_size),
        profiler=Profiler(job.profiling, job.job.dump_folder, dist.get_rank(), state.step),
    )


def load_checkpoint(job: JobConfig, state: TrainState) -> Checkpointer:
    """Make `state` that of the checkpoint that the run goes on from, if any, and save the job."""
    folder = Path(job.job.dump_folder)
    checkpointer = Checkpointer(job.checkpoint, folder / job.checkpoint.folder, state)
    checkpointer.load()
    if dist.get_rank() == 0:
        save_config(job, folder, state.step)
    return checkpointer


def _seed_generators(job: JobConfig) -> None:
    torch.manual_seed(job.debug.seed)
    random.seed(job.debug.seed)
    if job.debug.deterministic:
        # cuBLAS reads this when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def resolve_options(job: JobConfig) -> None:
    """Give options that depend on others, or on the run so far, the value that holds and is saved."""
    resolve_global_batch(job)
    fit_warmup(job.lr_scheduler, job.training.steps)
    job.training.global_batch_size = resolve_batch(job, dist.get_world_size()).global_


def resolve_global_batch(job: JobConfig) -> None:
    """A run that goes on keeps the global batch that it began with, whatever the number of ranks now."""
    path = own_checkpoint(job)
    if path is None or "data" in job.checkpoint.exclude_from_loading:
        return
    saved, asked = read_record(path)["global_batch_size"], job.training.global_batch_size
    if asked not in (-1, saved):
        raise ConfigError(
            f"training.global_batch_size = {asked}: {path} was made with {saved}; keep it, or start the data "
            "anew with checkpoint.exclude_from_loading = ['data']"
        )
    job.training.global_batch_size = saved


def own_checkpoint(job: JobConfig) -> Path | None:
    """The checkpoint that the run resumes from, if any."""
    return find(job.checkpoint, Path(job.job.dump_folder) / job.checkpoint.folder)


def require_weights(job: JobConfig, spec: TrainSpec) -> None:
    """Raises ConfigError where published weights that the run would start from do not fit its model.

    Asked before the dump folder is touched.
    """
    if job.checkpoint.initial_load_in_hf and own_checkpoint(job) is None:
        spec.initial_weights(job, shapes_of(spec.build_model(job, spec.load_tokenizer(job))))


def log_sizes(model: nn.Module, spec: TrainSpec, sizes: BatchSizes) -> None:
    """Logs the parameters of each part, and how a step divides into forwards."""
    counted = {part: sum(p.numel() for p in model.get_submodule(part).parameters()) for part in spec.parts}
    logger.info("parameters: " + ", ".join(f"{part} {count:,}" for part, count in counted.items()))
    logger.info(f"slots a step: {sizes.global_}, in {sizes.accumulation} forwards of {sizes.local} a rank")


def loader_of(
    job: JobConfig, spec: TrainSpec, tokenizer: Any, mesh: Mesh
) -> Callable[[str, str | None], Loader]:
    """(split, control) -> the loader of this data-parallel rank."""
    agree = agree_on_data if dist.get_world_size() > 1 else None
    place = {"rank": mesh.data.get_local_rank(), "ranks": mesh.data.size(), "agree": agree}
    group = slot_group(mesh)
    return lambda split, control: spec.build_loader(
        job, tokenizer, split=split, control=control, group=group, **place
    )


def to_rank_of(job: JobConfig, spec: TrainSpec, mesh: Mesh) -> Callable[[Batch], Tensors]:
    """Host batch -> what this rank's forward takes, on its device."""
    return lambda batch: to_device(spec.shard_batch(batch.tensors, mesh, job), mesh.device)


def require_one_job(job: JobConfig) -> None:
    """Machines are started one by one; where options differ, ranks would wait until they time out.

    The dump folder may differ. Raises ConfigError on every rank.
    """
    ours = {name: fields for name, fields in dataclasses.asdict(job).items() if name != "job"}
    first = from_first_rank(lambda: ours)
    other = [
        f"{section}.{name}"
        for section, fields in ours.items()
        for name in fields
        if fields[name] != first[section][name]
    ]
    if any_rank(bool(other)):
        differs = (
            f"has other options than rank 0: {', '.join(other)}"
            if other
            else "sees ranks with other options than its own"
        )
        raise ConfigError(f"rank {dist.get_rank()} {differs}; start every machine with the same")
