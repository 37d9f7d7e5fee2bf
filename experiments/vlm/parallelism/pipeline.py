"""The VLM as stages of a pipeline.

    stage 0          encoder, projector, embedding, placing, and decoder layers (or none)
    stages between   decoder layers
    last stage       decoder layers, norm, output layer with the loss

A stage is the whole model with parts missing, so its weights keep their names. Where embedding and output
layer are one weight the last stage holds the embedding too, tied as in the whole model: the same name, equal
values, one gradient (Pipeline sums it).
"""

import copy
from functools import partial

import torch
from torch import nn

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.vlm import VLM
from experiments.vlm.parallelism.parallelize import parallelize_vlm
from experiments.vlm.parallelism.shard_batch import whole_slots
from experiments.vlm.parallelism.stages import sends_back, split_layers
from torchtitan.distributed.mesh import Mesh
from torchtitan.distributed.pipeline_parallel import Pipeline
from torchtitan.distributed.stages import Split, stages_of_rank


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
    """This rank's stages of `model`, each parallelized, and the schedule that runs them."""
    p, sizes = job.parallelism, mesh.degrees
    split = split_layers(model, job, sizes)
    parts: list[nn.Module] = []
    for stage in stages_of_rank(p.pipeline_parallel_schedule, mesh.rank("pp"), sizes.pp, split.stages):
        part = cut(model, stage, split)
        parallelize_vlm(part, mesh, job)
        parts.append(part)
    tokens = job.training.seq_len // (sizes.cp * sizes.tp)
    received = torch.empty(
        p.pipeline_parallel_microbatch_size,
        tokens,
        model.config.decoder.dim,
        dtype=getattr(torch, job.training.mixed_precision_param),
        device="meta",
    )
    head = model.decoder.output
    assert head is not None
    return Pipeline(
        parts,
        split,
        mesh,
        p.pipeline_parallel_schedule,
        job.training.local_batch_size // p.pipeline_parallel_microbatch_size,
        received,
        head.sources,
        sends_back(model, split, p.pipeline_parallel_schedule),
        partial(whole_slots, mesh=mesh),
        next(iter(model.tied_names().values()), None),
    )
