"""Which module of the VLM gets which layout; how a layout works is said in torchtitan/distributed."""

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.vlm import VLM
from torchtitan.config.check import ConfigError
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import Sharding, shard, shard_blocks, sum_gradients
from torchtitan.distributed.mesh import Mesh


def parallelize_vlm(model: VLM, mesh: Mesh, job: VLMJobConfig) -> None:
    """In this order, since each wraps what the one before left: activation checkpointing, compile, FSDP.

    `model` may be a pipeline stage, which lacks some parts.
    """
    refuse_what_is_missing(mesh)
    towers = [(model.decoder, job.activation_checkpoint.mode), (model.encoder, job.activation_checkpoint.encoder_mode)]
    for tower, mode in towers:
        if tower is not None:
            apply_activation_checkpoint(tower.layers, mode, job.activation_checkpoint.selective_ac_option)
            if job.compile.enable:
                apply_compile(tower.layers)
    apply_fsdp(model, mesh, Sharding.of(job))


def refuse_what_is_missing(mesh: Mesh) -> None:
    for key, degree in (("tensor", mesh.degrees.tp), ("context", mesh.degrees.cp)):
        if degree > 1:
            raise ConfigError(f"parallelism.{key}_parallel_degree = {degree}: not built yet, use 1")


def apply_fsdp(model: VLM, mesh: Mesh, sharding: Sharding) -> None:
    """A group for each block, for what a tower has beside its blocks, and for what is left. See mesh.py for `enc`."""
    if model.encoder is not None:
        shard_blocks(model.encoder.layers.values(), mesh.enc, sharding)
        shard(model.encoder, mesh.enc, sharding)
    if model.projector is not None:
        shard(model.projector, mesh.enc, sharding)
    decoder = model.decoder
    shard_blocks(decoder.layers.values(), mesh.fsdp, sharding)
    first = [module for module in (decoder.tok_embeddings,) if module is not None]
    last = [module for module in (decoder.norm, decoder.output) if module is not None]
    if model.config.decoder.tied_embeddings and first and last:
        # One parameter belongs to one group: embedding and output layer stay gathered from the one to the other.
        shard([*first, *last], mesh.fsdp, sharding)
    else:
        if first:
            shard(first, mesh.fsdp, sharding)
        if last:
            shard(last, mesh.fsdp, sharding, last=True)
    shard(model, mesh.fsdp, sharding)
    sum_gradients(model)
