"""Which module of the VLM gets which layout; how a layout works is said in torchtitan/distributed."""

from torch.distributed.device_mesh import DeviceMesh

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.vlm import VLM
from experiments.vlm.parallelism.encoder_parallel import apply_encoder_tensor_parallel, apply_sharing
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_context_parallel
from torchtitan.distributed.fsdp import Sharding, shard, shard_blocks, sum_gradients
from torchtitan.distributed.mesh import Mesh
from torchtitan.distributed.tensor_parallel import overlap_with_products
from torchtitan.models.decoder.parallelize import apply_tensor_parallel


def parallelize_vlm(model: VLM, mesh: Mesh, job: VLMJobConfig) -> None:
    """In this order, since each wraps what the one before left: what splits the model, activation
    checkpointing, compile, FSDP.

    `model` may be a pipeline stage, which lacks some parts.
    """
    split_decoder(model, mesh, job)
    split_encoder(model, mesh, job)
    ac = job.activation_checkpoint
    for tower, recomputation in ((model.decoder, ac.decoder), (model.encoder, ac.encoder)):
        if tower is not None:
            apply_activation_checkpoint(tower.layers, recomputation)
            if job.compile.enable:
                apply_compile(tower.layers)
    heads = job.parallelism.encoder_tensor_parallel
    apply_fsdp(model, mesh, mesh.fsdp if heads else mesh.enc, Sharding.of(job))


def split_decoder(model: VLM, mesh: Mesh, job: VLMJobConfig) -> None:
    """Split the decoder over the ranks that hold the same slots: tokens (cp), and heads and columns (tp)."""
    if mesh.degrees.cp > 1:
        apply_context_parallel(
            model.decoder.layers.values(), mesh["cp"], job.parallelism.context_parallel_method
        )
    if mesh.degrees.tp > 1:
        apply_tensor_parallel(model.decoder, mesh["tp"])
        if job.parallelism.enable_async_tensor_parallel:
            overlap_with_products(mesh["tp"])


def split_encoder(model: VLM, mesh: Mesh, job: VLMJobConfig) -> None:
    """Split the encoder over the same ranks: patch rows or heads. Nothing where a stage has no encoder."""
    if model.encoder is None or model.projector is None:
        return
    if job.parallelism.encoder_tensor_parallel:
        apply_encoder_tensor_parallel(model.encoder, mesh["tp"])
    apply_sharing(model.projector, job, mesh)


def apply_fsdp(model: VLM, mesh: Mesh, vision: DeviceMesh, sharding: Sharding) -> None:
    """A group for each block, for the rest of each tower, and for what is left. Encoder and projector are
    sharded over `vision`: `enc` (mesh.py says why), or `fsdp` where their heads are split over tp.
    """
    if model.encoder is not None:
        shard_blocks(model.encoder.layers.values(), vision, sharding)
        shard(model.encoder, vision, sharding)
    if model.projector is not None:
        shard(model.projector, vision, sharding)
    decoder = model.decoder
    shard_blocks(decoder.layers.values(), mesh.fsdp, sharding)
    first = [module for module in (decoder.tok_embeddings,) if module is not None]
    last = [module for module in (decoder.norm, decoder.output) if module is not None]
    if model.config.decoder.tied_embeddings and first and last:
        # One parameter belongs to one group: embedding and output layer stay gathered from the one to the
        # other.
        shard([*first, *last], mesh.fsdp, sharding, last=True)
    else:
        if first:
            shard(first, mesh.fsdp, sharding)
        if last:
            shard(last, mesh.fsdp, sharding, last=True)
    shard(model, mesh.fsdp, sharding)
    sum_gradients(model)
