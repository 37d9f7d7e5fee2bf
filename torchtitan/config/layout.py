"""The layout that a job asks for: sizes of the mesh and of the batch, resolved. Imports no torch."""

import math
from dataclasses import dataclass

from torchtitan.config.errors import require
from torchtitan.config.job import JobConfig, Parallelism

# Stages each rank holds (interleaved schedules: at least; split points may ask for more).
STAGES_PER_RANK = {
    "GPipe": 1,
    "1F1B": 1,
    "Interleaved1F1B": 2,
    "InterleavedZeroBubble": 2,
    "ZBVZeroBubble": 2,
}
BALANCE_BLOCKS = 4  # context parallel deals this many blocks of a slot to each rank


@dataclass(frozen=True)
class Degrees:
    """Sizes of the mesh, all resolved; their product is the world size."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    pp: int

    @property
    def dp(self) -> int:
        """Data-parallel ranks: those with slots of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def ranks(self) -> int:
        """All of them: the world size."""
        return self.dp * self.cp * self.tp * self.pp

    @property
    def name(self) -> str:
        """The degrees above 1, for people: fsdp4.tp2."""
        sizes = {
            "replicate": self.dp_replicate,
            "fsdp": self.dp_shard,
            "cp": self.cp,
            "tp": self.tp,
            "pp": self.pp,
        }
        return ".".join(f"{what}{size}" for what, size in sizes.items() if size > 1) or "one rank"


@dataclass(frozen=True)
class BatchSizes:
    """Slots of a step. global_ = local * data-parallel degree * accumulation."""

    local: int  # B, slots a rank takes per forward
    global_: int  # G, slots per optimizer step
    accumulation: int  # forwards per optimizer step


def degrees(parallelism: Parallelism, world_size: int) -> Degrees:
    """The mesh for `world_size` processes, with -1 replaced by what is left.

    Raises ConfigError if they do not multiply to it.
    """
    p = parallelism
    others = {
        "data_parallel_replicate_degree": p.data_parallel_replicate_degree,
        "context_parallel_degree": p.context_parallel_degree,
        "tensor_parallel_degree": p.tensor_parallel_degree,
        "pipeline_parallel_degree": p.pipeline_parallel_degree,
    }
    rest = math.prod(others.values())
    shard = max(1, world_size // rest) if p.data_parallel_shard_degree == -1 else p.data_parallel_shard_degree
    left_over = p.data_parallel_shard_degree == -1
    asked = others if left_over else others | {"data_parallel_shard_degree": shard}
    chosen = [f"parallelism.{name} ({degree})" for name, degree in asked.items() if degree != 1]
    named = " * ".join(chosen) or "the parallel degrees (all 1)"
    relation = "divide" if left_over else "multiply to"
    message = f"{named} must {relation} the number of processes ({world_size}): change them, or NGPU"
    require(rest * shard == world_size, message)
    return Degrees(
        dp_replicate=p.data_parallel_replicate_degree,
        dp_shard=shard,
        cp=p.context_parallel_degree,
        tp=p.tensor_parallel_degree,
        pp=p.pipeline_parallel_degree,
    )


def resolve_batch(job: JobConfig, world_size: int) -> BatchSizes:
    """B, G and the accumulation steps between them.

    Raises ConfigError unless G = B * data-parallel degree * a whole number.
    """
    dp = degrees(job.parallelism, world_size).dp
    local, asked = job.training.local_batch_size, job.training.global_batch_size
    at_once = local * dp
    total = at_once if asked == -1 else asked
    fitting = max(1, total // at_once) * at_once
    require(
        total % at_once == 0,
        f"training.global_batch_size = {asked} is not a multiple of training.local_batch_size ({local}) * "
        f"data-parallel degree ({dp}): use {fitting} or {fitting + at_once}",
    )
    return BatchSizes(local, total, total // at_once)
