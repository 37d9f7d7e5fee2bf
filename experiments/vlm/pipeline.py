"""The VLM as stages of a pipeline.

    stage 0          encoder, projector, embedding, placing, and decoder layers (none where the encoder is a stage of its own)
    stages between   decoder layers
    last stage       decoder layers, norm, output layer with the loss

A stage is the whole model with parts missing, so its weights keep their names. Where embedding and output layer are one weight
the last stage holds the embedding too, tied as in the whole model: the same name, equal values, one gradient (Pipeline sums it).
"""

import copy
from functools import partial

import torch
from torch import nn

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.encoder_parallel import rows_a_forward, sharers
from experiments.vlm.model.flavors import VLMConfig
from experiments.vlm.model.sizes import encoder_parameters, projector_parameters
from experiments.vlm.model.vlm import VLM
from experiments.vlm.parallelize import parallelize_vlm
from experiments.vlm.shard_batch import whole_slots
from torchtitan.config.check import Degrees
from torchtitan.distributed.mesh import Mesh
from torchtitan.distributed.pipeline_parallel import Pipeline, Split, number_of_stages, split_evenly, stages_of_rank
from torchtitan.models.decoder.sizes import layer_parameters

TIED = "decoder.tok_embeddings.weight"


def split_layers(config: VLMConfig, vocab_size: int, job: VLMJobConfig, sizes: Degrees) -> Split:
    """By parallelism.pipeline_parallel_split_points, else so that no stage takes longer than it must."""
    p, layers = job.parallelism, config.decoder.layers
    if p.pipeline_parallel_split_points:
        return Split(layers, tuple(p.pipeline_parallel_split_points))
    stages = number_of_stages(p.pipeline_parallel_schedule, sizes.pp)
    layer, first, last = stage_costs(config, vocab_size, job, sizes)
    return Split(layers, tuple(split_evenly([layer] * layers, first, last, stages, p.pipeline_parallel_encoder_stage)))


def stage_costs(config: VLMConfig, vocab_size: int, job: VLMJobConfig, sizes: Degrees) -> tuple[float, float, float]:
    """FLOPs of a rank for one microbatch: of a decoder layer, of what stage 0 does before its layers, of the output layer.

    2 a parameter and row, times the passes (1 forward, 2 backward; 1 in place of 3 for a frozen encoder, 2 for a frozen decoder).
    Attention is left out: what documents and images look like is not known here, and it is small beside the products.
    """
    p, frozen = job.parallelism, job.training.freeze
    tokens = p.pipeline_parallel_microbatch_size * job.training.seq_len / (sizes.cp * sizes.tp)
    patches = rows_a_forward(job, sizes) * job.data.patches_per_row / sharers(job, sizes)
    if p.encoder_tensor_parallel:
        patches /= sizes.tp
    decoder_passes = 2 if "decoder" in frozen else 3
    encoder = (1 if "encoder" in frozen else 3) * encoder_parameters(config.encoder)
    merged = job.data.spatial_merge_size**2
    projector = 3 * projector_parameters(config.projector, config.encoder.dim, job.data.spatial_merge_size, config.decoder.dim) / merged
    layer = 2 * decoder_passes * tokens * layer_parameters(config.decoder)
    output = 2 * decoder_passes * tokens * config.decoder.dim * vocab_size
    return layer, 2 * patches * (encoder + projector), output


def cut(model: VLM, stage: int, split: Split) -> VLM:
    """A copy of `model` (on the meta device) with only the parts of one stage."""
    part = copy.deepcopy(model)
    decoder, last = part.decoder, stage == split.stages - 1
    decoder.layers = nn.ModuleDict({str(n): decoder.layers[str(n)] for n in split.of(stage)})
    if stage > 0:
        part.encoder = part.projector = None
        if not (last and decoder.config.tied_embeddings):
            decoder.tok_embeddings = None
    if not last:
        decoder.norm = decoder.output = None
    return part


def pipeline_vlm(model: VLM, mesh: Mesh, job: VLMJobConfig) -> Pipeline:
    p, sizes = job.parallelism, mesh.degrees
    assert model.decoder.output is not None
    split = split_layers(model.config, model.decoder.output.weight.shape[0], job, sizes)
    parts: list[nn.Module] = []
    for stage in stages_of_rank(p.pipeline_parallel_schedule, mesh.rank("pp"), sizes.pp, split.stages):
        part = cut(model, stage, split)
        parallelize_vlm(part, mesh, job)
        parts.append(part)
    tokens = job.training.seq_len // (sizes.cp * sizes.tp)
    received = partial(torch.empty, p.pipeline_parallel_microbatch_size, tokens, model.config.decoder.dim)
    return Pipeline(
        parts,
        split,
        mesh,
        p.pipeline_parallel_schedule,
        job.training.local_batch_size // p.pipeline_parallel_microbatch_size,
        received(dtype=getattr(torch, job.training.mixed_precision_param), device="meta", requires_grad=True),
        partial(whole_slots, mesh=mesh),
        TIED if model.config.decoder.tied_embeddings else None,
    )
