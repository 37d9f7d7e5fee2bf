"""What a job needs on each rank, found without running it: memory at the peak, FLOPs, traffic.

What each unit of the model needs is seen by running one rank's share of it on the meta device
(rank_share.py). FLOPs are those of full slots, with one document a slot and images as large as allowed: the
most a step can cost.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

from experiments.vlm.check import check_encoder
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.costs.flops import Work, flops_of_work
from experiments.vlm.costs.rank_share import RankShare, build_on_meta
from experiments.vlm.costs.recomputation import MODES, MixedShare, uniform, within_budget
from experiments.vlm.model_config import image_plan, model_config
from experiments.vlm.parallelism.sharing import slots_a_forward
from experiments.vlm.parallelism.stages import sends_back, split_layers
from torchtitan.config.check import check_pipeline, check_sequence
from torchtitan.config.errors import ConfigError
from torchtitan.config.layout import BatchSizes, Degrees, resolve_batch
from torchtitan.distributed.estimate import (
    FLOAT32,
    Memory,
    Storage,
    factorisations,
    in_flight,
    peak_memory,
    traffic,
)
from torchtitan.distributed.fsdp import Sharding
from torchtitan.distributed.stages import Split, stages_of_rank
from torchtitan.models.decoder.check import check_decoder
from torchtitan.tools.hardware import GIB


@dataclass(frozen=True)
class Estimate:
    """What a layout needs."""

    job: VLMJobConfig  # fitted to the layout and to its memory budget
    sizes: Degrees
    batch: BatchSizes
    memory: Memory  # of the rank of a pipeline that needs most
    rank: int  # which, along pp
    flops: int  # of a step, all ranks together, forward and backward
    sent: dict[str, float]  # bytes that rank sends in a step, by collective
    notes: tuple[str, ...]  # where the batch was changed to fit the layout

    @property
    def sent_per_slot(self) -> float:
        """Bytes that all ranks together send for one slot."""
        return sum(self.sent.values()) * self.sizes.ranks / self.batch.global_


class Shares:
    """The whole model of a job, and the shares of a rank that were asked for; for estimates of one model."""

    def __init__(self, job: VLMJobConfig, vocab_size: int, on_gpu: bool):
        self.config, self._vocab_size, self._on_gpu = model_config(job), vocab_size, on_gpu
        self.model = build_on_meta(job, self.config, vocab_size)
        self.flops = flops_of_work(self.model)
        self._found: dict[tuple, RankShare] = {}

    def of(self, job: VLMJobConfig, sizes: Degrees) -> RankShare:
        """`job` may differ from the first one in its layout, batch, patches of a row, loss chunk and
        recomputation. How FSDP divides a share does not matter.
        """
        ac, row, chunk = job.activation_checkpoint, job.data.patches_per_row, job.training.loss_chunk_tokens
        slots = slots_a_forward(job, sizes)
        key = (sizes.cp, sizes.tp, slots, row, chunk, ac.encoder, ac.decoder)
        if key not in self._found:
            self._found[key] = RankShare(job, self.config, self._vocab_size, sizes, slots, self._on_gpu)
        return self._found[key]


def estimate(job: VLMJobConfig, sizes: Degrees, vocab_size: int, on_gpu: bool = True) -> Estimate:
    """The estimate of one layout. Raises ConfigError where it cannot run; its batch is made to fit.

    On CPU a norm keeps more, and Muon exchanges float32.
    """
    return estimate_with(Shares(job, vocab_size, on_gpu), job, sizes)


def estimates(job: VLMJobConfig, world_size: int, vocab_size: int, most: Degrees) -> Iterator[Estimate]:
    """Estimates of every layout of `world_size` ranks that can run, with at most `most` in each dimension."""
    shares = Shares(job, vocab_size, on_gpu=True)
    for sizes in factorisations(world_size, most):
        with contextlib.suppress(ConfigError):
            yield estimate_with(shares, with_degrees(job, sizes), sizes)


def estimate_with(shares: Shares, job: VLMJobConfig, sizes: Degrees) -> Estimate:
    """As `estimate`, for one of several jobs with the same model."""
    job, notes = fit_batch(job, sizes)
    check_sequence(job, sizes)
    check_pipeline(job, sizes)
    check_encoder(job, shares.config.encoder, sizes)
    check_decoder(shares.config.decoder, job, sizes, job.parallelism.pipeline_parallel_encoder_stage)
    batch = resolve_batch(job, sizes.ranks)
    if job.activation_checkpoint.memory_budget_gib:
        job, share = _within_budget(job, sizes, shares, batch)
    else:
        share = shares.of(job, sizes)
    memory, sent, rank = _worst(job, sizes, shares, batch, share)
    return Estimate(job, sizes, batch, memory, rank, shares.flops(work_of_step(job, batch)), sent, notes)


def _within_budget(
    job: VLMJobConfig, sizes: Degrees, shares: Shares, batch: BatchSizes
) -> tuple[VLMJobConfig, RankShare | MixedShare]:
    """The job with the layers that it recomputes, and its share."""
    free, budget = uniform(job, "all"), job.activation_checkpoint.memory_budget_gib * GIB
    if _worst(free, sizes, shares, batch, whole := shares.of(free, sizes))[0].total <= budget:
        return free, whole
    ways = {kept: shares.of(uniform(job, kept), sizes) for kept in MODES}
    share = MixedShare(ways)

    def peak(candidate: VLMJobConfig) -> float:
        share.keep_as(candidate)
        return _worst(candidate, sizes, shares, batch, share)[0].total

    chosen = within_budget(job, shares.model, ways, sizes, peak)
    share.keep_as(chosen)
    return chosen, share


def _worst(
    job: VLMJobConfig,
    sizes: Degrees,
    shares: Shares,
    batch: BatchSizes,
    share: RankShare | MixedShare,
) -> tuple[Memory, dict[str, float], int]:
    """Memory and traffic of the rank of a pipeline that needs most, and which rank that is."""
    split = Split(shares.config.decoder.layers, ())
    if sizes.pp > 1:
        split = split_layers(shares.model, job, sizes)
    back = sends_back(shares.model, split, job.parallelism.pipeline_parallel_schedule)
    ranks = [_of_rank(job, sizes, batch, share, split, back, rank) for rank in range(sizes.pp)]
    worst = max(range(sizes.pp), key=lambda rank: ranks[rank][0].total)
    return *ranks[worst], worst


def _of_rank(
    job: VLMJobConfig,
    sizes: Degrees,
    batch: BatchSizes,
    share: RankShare | MixedShare,
    split: Split,
    back: list[bool],
    rank: int,
) -> tuple[Memory, dict[str, float]]:
    schedule, last = job.parallelism.pipeline_parallel_schedule, split.stages - 1
    stages = stages_of_rank(schedule, rank, sizes.pp, split.stages) if sizes.pp > 1 else [0]
    units = [list(share.units(sizes, split.of(stage), stage == 0, stage == last)) for stage in stages]
    microbatches = batch.local // slots_a_forward(job, sizes)
    storage = Storage(
        Sharding.of(job),
        forwards=batch.accumulation * microbatches,
        reductions=batch.accumulation,
        all_reductions=batch.accumulation if sizes.pp > 1 else 1,
    )
    flying = in_flight(schedule, rank, sizes.pp, microbatches)
    memory = peak_memory(units, storage, flying, microbatches * share.batch_bytes)
    sent = traffic([unit for stage in units for unit in stage], storage)
    if sizes.pp > 1:
        # The residual stream goes on after forward, and its gradient back, unless this rank goes on itself.
        on = sum(stage < last and stage + 1 not in stages for stage in stages)
        on += sum(back[stage] and stage - 1 not in stages for stage in stages)
        sent["pp send"] = on * storage.forwards * share.residual_bytes
    if share.tied_numbers and (0 in stages) != (last in stages):
        # Both ends of the pipeline hold the table, and add up the gradients of their shards once a step.
        sent["pp tied embedding"] = FLOAT32 * share.tied_numbers / (sizes.dp_shard * sizes.cp)
    return memory, sent


def with_degrees(job: VLMJobConfig, sizes: Degrees) -> VLMJobConfig:
    """The job under another layout. What only makes sense under its own is left out."""
    job = copy.deepcopy(job)
    p = job.parallelism
    p.data_parallel_replicate_degree, p.data_parallel_shard_degree = sizes.dp_replicate, sizes.dp_shard
    p.context_parallel_degree = sizes.cp
    p.tensor_parallel_degree = sizes.tp
    p.pipeline_parallel_degree = sizes.pp
    p.pipeline_parallel_split_points = []
    p.pipeline_parallel_encoder_stage = p.pipeline_parallel_encoder_stage and sizes.pp > 1
    p.encoder_tensor_parallel = p.encoder_tensor_parallel and sizes.tp > 1
    return job


def fit_batch(job: VLMJobConfig, sizes: Degrees) -> tuple[VLMJobConfig, tuple[str, ...]]:
    """The job with a batch that the layout can train: slots for all stages, a global batch that divides."""
    job, notes = copy.deepcopy(job), []
    job.parallelism.pipeline_parallel_degree = sizes.pp
    local = slots_for_stages(job, sizes.pp) if sizes.pp > 1 else job.training.local_batch_size
    if local != job.training.local_batch_size:
        notes.append(
            f"training.local_batch_size {job.training.local_batch_size} -> {local}, for {sizes.pp} stages"
        )
        job.training.local_batch_size = local
    asked, at_once = job.training.global_batch_size, local * sizes.dp
    if asked != -1 and asked % at_once:
        notes.append(f"training.global_batch_size {asked} -> {at_once}, slots * data-parallel degree")
        job.training.global_batch_size = at_once
    return job, tuple(notes)


def slots_for_stages(job: VLMJobConfig, pp: int) -> int:
    """At least the job's: whole microbatches, one a stage, and as many as an interleaved schedule deals."""
    size = job.parallelism.pipeline_parallel_microbatch_size
    count = max(-(-job.training.local_batch_size // size), pp)
    if job.parallelism.pipeline_parallel_schedule.startswith("Interleaved") and count % (count // pp):
        count = -(-count // pp) * pp
    return count * size


def work_of_step(job: VLMJobConfig, batch: BatchSizes) -> Work:
    """The work of a step whose slots are full, each of one document and of images as large as allowed."""
    d, length, largest = job.data, job.training.seq_len, image_plan(job).max_patches
    patches, tokens = batch.global_ * d.patch_rows * d.patches_per_row, batch.global_ * length
    return Work(patches, tokens, patches * largest, tokens * (length + 1) // 2)
