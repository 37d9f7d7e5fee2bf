"""A look before training: all is checked, the model built without storage, one batch read."""

from typing import Any

import torch
from torch import nn

from torchtitan.build import log_sizes
from torchtitan.components.float8 import log_float8, require_device
from torchtitan.components.freezing import choose_trained, rows_of
from torchtitan.components.lr_scheduler import fit_warmup
from torchtitan.components.memory_check import held_gib
from torchtitan.components.parameter_groups import settings
from torchtitan.components.weights import shapes_of
from torchtitan.config.job import JobConfig
from torchtitan.config.layout import BatchSizes, Degrees, degrees, resolve_batch
from torchtitan.config.shipped import shipped
from torchtitan.distributed.process_group import world_size
from torchtitan.spec import TrainSpec
from torchtitan.tools.hardware import GIB, memory_gib
from torchtitan.tools.hub import get_it
from torchtitan.tools.logging import logger, warn_once


def dry_run(job: JobConfig, spec: TrainSpec) -> None:
    """Looks, in one process: every rank would do the same. Raises ConfigError.

    Without the tokenizer's file the sizes are those of the published vocabulary; without it or data, no batch
    is read.
    """
    require_device(job.float8, _device())
    ranks = world_size()
    sizes, layout = resolve_batch(job, ranks), degrees(job.parallelism, ranks)
    fit_warmup(job.lr_scheduler, job.training.steps)
    path, missing = shipped(job.model.tokenizer_path), spec.missing_data(job)
    tokenizer = spec.load_tokenizer(job) if path.exists() else None
    spec.fit_memory(job, layout, tokenizer)
    model = spec.build_model(job, tokenizer)
    choose_trained(model, job.training)
    token_rows = rows_of(job.training.trainable_tokens, tokenizer) if tokenizer else ()
    settings(model, job.optimizer, token_rows)  # every pattern matches something
    log_sizes(model, spec, sizes)
    log_float8(model, job.float8)
    _log_weights(job, spec, model)
    _log_run(job, layout, sizes)
    log_memory(job, spec, layout, tokenizer, held_gib(model, job, layout))
    if tokenizer is None:
        key = f"model.tokenizer_path = {job.model.tokenizer_path}"
        warn_once(f"{key} is not here: vocabulary as published, and no batch was read; {get_it(path)}")
    for line in missing:
        warn_once(f"{line}; no batch was read")
    if tokenizer and not missing:
        spec.open_tasks(job, tokenizer, 0, 1)  # every record can be asked
        log_batch(job, spec, layout, tokenizer, model)
    logger.info("dry run: nothing was trained")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _log_weights(job: JobConfig, spec: TrainSpec, model: nn.Module) -> None:
    """Log what would be taken from published weights, where they are here. Raises ConfigError for misfits."""
    source = spec.initial_weights(job, shapes_of(model))
    for line in source.report() if source else ():
        logger.info(line)


def _log_run(job: JobConfig, layout: Degrees, sizes: BatchSizes) -> None:
    steps, length = job.training.steps, job.training.seq_len
    logger.info(f"layout: {layout.name}")
    a_step = f"{sizes.global_} slots of {length:,} tokens"
    logger.info(f"tokens of the run: {steps * sizes.global_ * length:,}, in {steps:,} steps of {a_step}")


def log_memory(job: JobConfig, spec: TrainSpec, layout: Degrees, tokenizer: Any, held: float) -> None:
    """`held`: GiB of a rank. What the peak leaves out is said in torchtitan/distributed/estimate.py."""
    device = _device()
    peak, there = spec.memory(job, layout, tokenizer, device.type == "cuda"), memory_gib(device)
    logger.info(f"weights, gradients and {job.optimizer.name} state: {held:.2f} GiB a rank")
    logger.info(f"peak memory: {peak.total / GIB:.2f} GiB of tensors a rank, in {peak.where}")
    if peak.total / GIB <= there:
        logger.info(f"it fits this machine: {there:.1f} GiB of {device.type} memory a rank")
    else:
        warn_once(f"it does not fit this machine: {there:.1f} GiB of {device.type} memory a rank")


def log_batch(job: JobConfig, spec: TrainSpec, layout: Degrees, tokenizer: Any, model: nn.Module) -> None:
    """The first batch of rank 0: its tensors, how full it is, and what it costs."""
    loader = spec.build_loader(
        job, tokenizer, rank=0, ranks=layout.dp, split="train", control=None, agree=None, group=None
    )
    try:
        batch = next(iter(loader)).batches[0]
    finally:
        loader.close()
    for name, tensor in batch.tensors.items():
        size = tensor.numel() * tensor.element_size() / 2**20
        logger.info(
            f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, {size:.1f} MiB"
        )
    slots = len(batch.tensors["labels"])
    held = {
        name: 100 * batch.counts[name] / (size * slots) for name, size in spec.counts(job).capacity.items()
    }
    shares = ", ".join(f"{name} {share:.1f}%" for name, share in held.items())
    logger.info(f"first batch: {shares}; {spec.flops(job, model)(batch) / 1e9:.1f} GFLOPs")
