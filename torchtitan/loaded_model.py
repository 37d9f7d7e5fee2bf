"""A model with its weights, from a job: built, laid out over ranks, given storage and values.

Training, conversion and generation share it; nothing here optimizes, loads data or keeps time.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtitan.components.checkpoint_read import require_scale
from torchtitan.components.forward_backward import ForwardBackward, Plain
from torchtitan.components.weights import CheckpointSource, WeightSource, fill, shapes_of, to_empty
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import Float8, JobConfig
from torchtitan.distributed.mesh import Mesh
from torchtitan.layers.lora import scale_of
from torchtitan.spec import TrainSpec


def open_model(
    job: JobConfig, spec: TrainSpec, mesh: Mesh, tokenizer: Any, checkpoint: Path | None
) -> ForwardBackward:
    """The job's model for use, with the weights of a checkpoint, or (None) what the job starts from.

    Raises ConfigError where they are not of this model, before anything is made.
    """
    model, source = _model_and_source(job, spec, tokenizer, checkpoint)
    forward_backward = parallelize(model, mesh, job, spec)
    give_weights(forward_backward, model, job, mesh, source)
    for part in forward_backward.parts:
        part.eval()
    return forward_backward


def open_plain_model(
    job: JobConfig, spec: TrainSpec, device: torch.device, tokenizer: Any, checkpoint: Path | None
) -> nn.Module:
    """As `open_model`, of one process and in no layout: the module as it was written, in float32."""
    model, source = _model_and_source(job, spec, tokenizer, checkpoint)
    to_empty([model], device)
    fill([model], model.tied_names(), job.debug.seed, source)
    return model.eval()


def _model_and_source(
    job: JobConfig, spec: TrainSpec, tokenizer: Any, checkpoint: Path | None
) -> tuple[Any, WeightSource | None]:
    # Weights know nothing of fp8, and answers, exports and other machines need none.
    model = spec.build_model(dataclasses.replace(job, float8=Float8()), tokenizer)
    shapes = shapes_of(model)
    if checkpoint:
        require_scale(checkpoint, scale_of(model))
        return model, CheckpointSource(checkpoint, shapes)
    return model, spec.initial_weights(job, shapes)


def parallelize(model: nn.Module, mesh: Mesh, job: JobConfig, spec: TrainSpec) -> ForwardBackward:
    """Lay the model out over the ranks, while it is on the meta device."""
    if mesh.degrees.pp > 1:
        if spec.pipeline is None:
            raise ConfigError(
                f"parallelism.pipeline_parallel_degree = {mesh.degrees.pp}: {spec.name} has no pipeline"
            )
        return spec.pipeline(model, mesh, job)
    spec.parallelize(model, mesh, job)
    return Plain(model, spec.loss, lambda part, tensors: spec.score(part, tensors, mesh))


def give_weights(
    forward_backward: ForwardBackward,
    model: Any,
    job: JobConfig,
    mesh: Mesh,
    source: WeightSource | None = None,
) -> None:
    """Give this rank's shards storage and values. What `source` lacks starts from the seed."""
    to_empty(forward_backward.parts, "cpu" if job.training.enable_cpu_offload else mesh.device)
    fill(forward_backward.parts, model.tied_names(), job.debug.seed, source)
