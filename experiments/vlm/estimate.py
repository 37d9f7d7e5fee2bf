"""What a job needs on each rank, told without running it: memory at the peak, FLOPs, traffic.

What each tower keeps: the decoder's in torchtitan/models/decoder/footprint.py, the encoder's here. FLOPs are those of full slots,
with one document a slot and images as large as allowed: the most a step can cost.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from experiments.vlm.check import check_encoder
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.flops import Work, flops_of_work
from experiments.vlm.model.flavors import FLAVORS, VLMConfig
from experiments.vlm.model.sizes import encoder_layer_parameters, patch_embedding_parameters, projector_parameters
from experiments.vlm.model.vlm import VLM
from experiments.vlm.sharing import rows_a_forward, sharers
from experiments.vlm.stages import split_layers
from torchtitan.config.check import check_pipeline, check_sequence
from torchtitan.config.errors import ConfigError
from torchtitan.config.layout import BatchSizes, Degrees, resolve_batch
from torchtitan.distributed.estimate import FLOAT32, Memory, Storage, Unit, factorisations, in_flight, peak_memory, traffic
from torchtitan.distributed.stages import Split, stages_of_rank
from torchtitan.models.decoder import footprint
from torchtitan.models.decoder.check import check_decoder
from torchtitan.models.decoder.footprint import Share
from torchtitan.models.decoder.sizes import embedding_parameters, layer_parameters

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Estimate:
    sizes: Degrees
    batch: BatchSizes
    memory: Memory  # of the rank of a pipeline that needs most
    rank: int  # which, along pp
    flops: int  # of a step, all ranks together, forward and backward
    sent: dict[str, float]  # bytes that rank sends in a step, by collective
    notes: tuple[str, ...]  # where the batch was changed to fit the layout

    @property
    def ranks(self) -> int:
        return self.sizes.dp * self.sizes.cp * self.sizes.tp * self.sizes.pp

    @property
    def sent_per_slot(self) -> float:
        """Bytes that all ranks together send for one slot."""
        return sum(self.sent.values()) * self.ranks / self.batch.global_


@dataclass(frozen=True)
class Patches:
    """One forward of the encoder on one rank."""

    own: float  # patches that this rank encodes
    all: float  # of its slots
    tp: int  # ranks that share the heads
    bytes: int


def estimate(job: VLMJobConfig, sizes: Degrees, vocab_size: int, on_gpu: bool = True) -> Estimate:
    """For one layout. Raises ConfigError where it cannot run, but never for the batch: that is made to fit.

    On CPU a norm keeps more, and Muon exchanges float32.
    """
    job, notes = fit_batch(job, sizes)
    config = FLAVORS[job.model.flavor]
    check_sequence(job, sizes)
    check_pipeline(job, sizes)
    check_encoder(job, config.encoder, sizes)
    check_decoder(config.decoder, job, sizes)
    batch = resolve_batch(job, sizes.dp * sizes.cp * sizes.tp * sizes.pp)
    model = model_of(config, vocab_size, job.data.spatial_merge_size, tuple(job.training.freeze))
    split = split_layers(model, job, sizes) if sizes.pp > 1 else Split(config.decoder.layers, ())
    ranks = [_of_rank(job, sizes, batch, config, vocab_size, on_gpu, split, rank) for rank in range(sizes.pp)]
    worst = max(range(sizes.pp), key=lambda rank: ranks[rank][0].total)
    memory, sent = ranks[worst]
    return Estimate(sizes, batch, memory, worst, flops_of_step(job, batch, model), sent, notes)


@lru_cache(maxsize=8)
def model_of(config: VLMConfig, vocab_size: int, merge_size: int, frozen: tuple[str, ...]) -> VLM:
    """The whole model, on the meta device."""
    with torch.device("meta"):
        model = VLM(config, vocab_size, merge_size, "sdpa", loss_chunk=1)
    for part in frozen:
        model.get_submodule(part).requires_grad_(False)
    return model


def estimates(job: VLMJobConfig, world_size: int, vocab_size: int, most: Degrees) -> Iterator[Estimate]:
    """Of every layout of `world_size` ranks that can run, with at most `most` in each dimension."""
    for sizes in factorisations(world_size, most):
        with contextlib.suppress(ConfigError):
            yield estimate(with_degrees(job, sizes), sizes, vocab_size)


def with_degrees(job: VLMJobConfig, sizes: Degrees) -> VLMJobConfig:
    """The job under another layout. What only makes sense under its own is left out."""
    job = copy.deepcopy(job)
    p = job.parallelism
    p.data_parallel_replicate_degree, p.data_parallel_shard_degree = sizes.dp_replicate, sizes.dp_shard
    p.context_parallel_degree, p.tensor_parallel_degree, p.pipeline_parallel_degree = sizes.cp, sizes.tp, sizes.pp
    p.pipeline_parallel_split_points = []
    p.pipeline_parallel_encoder_stage = p.pipeline_parallel_encoder_stage and sizes.pp > 1
    p.encoder_tensor_parallel = p.encoder_tensor_parallel and sizes.tp > 1
    return job


def fit_batch(job: VLMJobConfig, sizes: Degrees) -> tuple[VLMJobConfig, tuple[str, ...]]:
    """A batch that the layout can train: enough slots for the stages, and a global batch that divides."""
    job, notes = copy.deepcopy(job), []
    local = slots_for_stages(job, sizes.pp) if sizes.pp > 1 else job.training.local_batch_size
    if local != job.training.local_batch_size:
        notes.append(f"training.local_batch_size {job.training.local_batch_size} -> {local}, for {sizes.pp} stages")
        job.training.local_batch_size = local
    asked, at_once = job.training.global_batch_size, local * sizes.dp
    if asked != -1 and asked % at_once:
        notes.append(f"training.global_batch_size {asked} -> {at_once}, slots * data-parallel degree")
        job.training.global_batch_size = at_once
    return job, tuple(notes)


def slots_for_stages(job: VLMJobConfig, pp: int) -> int:
    """At least those of the job: whole microbatches, one for each stage, and as many as an interleaved schedule can deal."""
    size = job.parallelism.pipeline_parallel_microbatch_size
    count = max(-(-job.training.local_batch_size // size), pp)
    if job.parallelism.pipeline_parallel_schedule.startswith("Interleaved") and count % (count // pp):
        count = -(-count // pp) * pp
    return count * size


def _of_rank(
    job: VLMJobConfig, sizes: Degrees, batch: BatchSizes, config: VLMConfig, vocab_size: int, on_gpu: bool, split: Split, rank: int
) -> tuple[Memory, dict[str, float]]:
    p, count = job.parallelism, split.stages
    stages = stages_of_rank(p.pipeline_parallel_schedule, rank, sizes.pp, count) if sizes.pp > 1 else [0]
    slots = p.pipeline_parallel_microbatch_size if sizes.pp > 1 else batch.local
    e = BYTES[job.training.mixed_precision_param]
    trains = "decoder" not in job.training.freeze
    share = Share(slots, job.training.seq_len, sizes.cp, sizes.tp, p.context_parallel_method, e, on_gpu, trains)
    parts: list[list[Unit]] = []
    for stage in stages:
        layers = len(split.of(stage))
        first, last = stage == 0, stage == count - 1
        vision = vision_units(job, sizes, config) if first else []
        parts.append(vision + decoder_units(job, sizes, config, vocab_size, share, layers, first, last))
    microbatches = batch.local // slots
    storage = storage_of(job, sizes, batch, microbatches, on_gpu)
    flying = in_flight(p.pipeline_parallel_schedule, rank, sizes.pp, microbatches)
    memory = peak_memory(parts, storage, flying, input_bytes(job, sizes, batch))
    sent = traffic([unit for part in parts for unit in part], storage)
    if config.decoder.tied_embeddings and trains and (0 in stages) != (count - 1 in stages):
        # Both ends of the pipeline hold the table, and add up the gradients of their shards once a step.
        sent["pp tied embedding"] = FLOAT32 * embedding_parameters(config.decoder, vocab_size) / (sizes.tp * sizes.dp_shard * sizes.cp)
    return memory, sent


def storage_of(job: VLMJobConfig, sizes: Degrees, batch: BatchSizes, microbatches: int, on_gpu: bool) -> Storage:
    t, policy = job.training, job.parallelism.fsdp_reshard_after_forward
    return Storage(
        parameter=BYTES[t.mixed_precision_param],
        reduced=BYTES[t.mixed_precision_reduce],
        reshard=policy == "always" or (policy == "default" and sizes.pp == 1),
        forwards=batch.accumulation * microbatches,
        reductions=batch.accumulation,
        all_reductions=batch.accumulation if sizes.pp > 1 else 1,
        update=2 if on_gpu else FLOAT32,
        offload=t.enable_cpu_offload,
    )


def input_bytes(job: VLMJobConfig, sizes: Degrees, batch: BatchSizes) -> float:
    """Of a batch on the device: pixels, their places, and the fields of each token."""
    d = job.data
    patches = batch.local * d.patch_rows * d.patches_per_row / sharers(job, sizes)
    tokens = batch.local * job.training.seq_len / sizes.cp
    return patches * (3 * d.patch_size**2 + 12) + tokens * (3 * 8 + 2 * 4)


def kept_of(mode: str, option: str, number: int, everything: float, selective: float, own_input: float) -> float:
    """What a block keeps under a mode of activation checkpointing."""
    if mode == "none" or (mode == "selective" and option != "op" and number % int(option)):
        return everything
    return selective if mode == "selective" and option == "op" else own_input


def decoder_units(
    job: VLMJobConfig, sizes: Degrees, config: VLMConfig, vocab_size: int, share: Share, layers: int, first: bool, last: bool
) -> list[Unit]:
    c = config.decoder
    unit = partial(Unit, shards=sizes.dp_shard * sizes.cp, copies=sizes.dp_replicate, trains=share.trains)
    table = embedding_parameters(c, vocab_size) // sizes.tp
    residual = share.bytes * share.residual * c.dim
    # Before the first block the sequence is scattered, and gathered after the last; in backward the other way round.
    # What ties both ends together stays gathered from the one to the other, and so does the output layer alone (fsdp.py).
    never_kept = job.parallelism.fsdp_reshard_after_forward == "always"
    around = {"tp all-gather and reduce-scatter": 2 * share.bytes * share.tokens * c.dim * (sizes.tp - 1) / sizes.tp}
    units = []
    if first:
        again = never_kept or not c.tied_embeddings
        units.append(unit("embedding", table, in_backward=again, stays=c.tied_embeddings, backward=residual, sent=dict(around)))
    layer = partial(unit, muon=job.optimizer.name == "Muon", tp=sizes.tp)
    units += [decoder_layer(job, config, share, layer, number) for number in range(layers)]
    if last:
        units.append(
            unit(
                "output layer",
                0 if c.tied_embeddings and first else table,
                in_backward=never_kept,
                kept=footprint.head_kept(c, vocab_size, share),
                forward=footprint.head_forward(c, vocab_size, share, job.training.loss_chunk_tokens),
                backward=footprint.head_backward(c, vocab_size, share),
                sent=dict(around),
            )
        )
    if sizes.pp > 1 and units:
        # The residual stream goes on after forward, or its gradient back.
        units[-1].sent["pp send"] = residual
    return units


def decoder_layer(job: VLMJobConfig, config: VLMConfig, share: Share, unit: Callable[..., Unit], number: int) -> Unit:
    c, ac = config.decoder, job.activation_checkpoint
    everything, working = footprint.layer_kept(c, share), footprint.layer_working(c, share)
    selective, own_input = footprint.layer_kept_selective(c, share), footprint.layer_input(c, share)
    kept = kept_of(ac.mode, ac.selective_ac_option, number, everything, selective, own_input)
    again = everything - kept
    parameters = layer_parameters(c) // share.tp
    sent = footprint.layer_sent(c, share)
    return unit(f"decoder layer {number}", parameters, kept=kept, forward=working / 2 + again, backward=working + again, sent=sent)


def vision_units(job: VLMJobConfig, sizes: Degrees, config: VLMConfig) -> list[Unit]:
    """Patch embedding, encoder layers, projector."""
    heads = sizes.tp if job.parallelism.encoder_tensor_parallel else 1
    rows, ranks = rows_a_forward(job, sizes) * job.data.patches_per_row, sharers(job, sizes)
    patches = Patches(rows / ranks, rows, heads, BYTES[job.training.mixed_precision_param])
    shards = sizes.dp_shard * sizes.cp * (1 if heads > 1 else sizes.tp)
    unit = partial(Unit, shards=shards, copies=sizes.dp_replicate, muon=job.optimizer.name == "Muon")
    layer = partial(unit, tp=heads)
    layers = [encoder_layer(job, config, patches, layer, number) for number in range(config.encoder.layers)]
    return [patch_embedding(job, config, patches, unit), *layers, projector(job, config, patches, unit)]


def patch_embedding(job: VLMJobConfig, config: VLMConfig, patches: Patches, unit: Callable[..., Unit]) -> Unit:
    """It holds the encoder's last norm too, which FSDP gathers with it."""
    c, trains = config.encoder, "encoder" not in job.training.freeze
    pixels, table = 3 * c.patch_size**2, c.position_grid**2
    kept = trains * patches.own * (patches.bytes * pixels + FLOAT32 * table)
    forward = patches.own * FLOAT32 * (2 * pixels + table + 2 * c.dim)
    parameters = patch_embedding_parameters(c) + 2 * c.dim
    return unit("patch embedding", parameters, trains=trains, in_backward=trains, kept=kept, forward=forward)


def encoder_layer(job: VLMJobConfig, config: VLMConfig, patches: Patches, unit: Callable[..., Unit], number: int) -> Unit:
    c, ac, tp = config.encoder, job.activation_checkpoint, patches.tp
    trains = "encoder" not in job.training.freeze
    own, wide = patches.own * c.dim, patches.own * c.mlp_dim / tp
    everything, working = encoder_layer_kept(config, patches), patches.bytes * (2 * own + wide)
    selective = patches.bytes * (4 * own + 4 * own / tp + wide)
    kept = trains * kept_of(ac.encoder_mode, ac.selective_ac_option, number, everything, selective, patches.bytes * own)
    again = everything - kept
    reduced = 4 * 2 * (tp - 1) / tp * patches.bytes * own
    return unit(
        f"encoder layer {number}",
        encoder_layer_parameters(c) // tp,
        trains=trains,
        in_backward=trains,
        kept=kept,
        forward=working / 2 + again,
        backward=working + again,
        sent={"tp encoder all-reduce": reduced},
    )


def projector(job: VLMJobConfig, config: VLMConfig, patches: Patches, unit: Callable[..., Unit]) -> Unit:
    """Its result is what the ranks of a group exchange."""
    c, merged, e = config.encoder, job.data.spatial_merge_size**2, patches.bytes
    own, hidden = patches.own * c.dim, patches.own / merged * config.projector.hidden_dim
    visual = e * patches.all / merged * config.decoder.dim
    trained, trains = (part not in job.training.freeze for part in ("encoder", "projector"))
    return unit(
        "projector",
        projector_parameters(config.projector, c.dim, job.data.spatial_merge_size, config.decoder.dim),
        trains=trains,
        in_backward=trains or trained,
        kept=e * (2 * own + 2 * hidden) + trained * e * own,
        forward=visual,
        backward=visual + 2 * e * own,
        sent={"encoder sharing": 2 * (1 - patches.own / patches.all) * visual},
    )


def encoder_layer_kept(config: VLMConfig, patches: Patches) -> float:
    """Inputs and results of two LayerNorms, q k v and attention, and the two widths of the MLP."""
    c, p = config.encoder, patches.own
    lse = FLOAT32 * p * c.heads / patches.tp
    return patches.bytes * p * (4 * c.dim + (4 * c.dim + 2 * c.mlp_dim) / patches.tp) + lse


def flops_of_step(job: VLMJobConfig, batch: BatchSizes, model: VLM) -> int:
    """With every slot full, of one document and of images as large as allowed."""
    d, length = job.data, job.training.seq_len
    patches, tokens = batch.global_ * d.patch_rows * d.patches_per_row, batch.global_ * length
    return flops_of_work(model)(Work(patches, tokens, patches * d.max_patches_per_image, tokens * (length + 1) // 2))
