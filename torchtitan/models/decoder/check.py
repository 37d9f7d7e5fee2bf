"""Checks of a job against the sizes of its decoder. Imports no torch."""

from torchtitan.config.errors import require
from torchtitan.config.job import JobConfig
from torchtitan.config.layout import STAGES_PER_RANK, Degrees
from torchtitan.models.decoder.flavors import DecoderConfig


def check_decoder(config: DecoderConfig, job: JobConfig, sizes: Degrees, stage_before: bool = False) -> None:
    """Raises ConfigError where a parallel layout does not divide the decoder, or where it cannot see all of a
    slot. `stage_before`: what feeds the decoder is a pipeline stage of its own.
    """
    require(
        config.window is None or job.training.seq_len <= config.window,
        f"training.seq_len = {job.training.seq_len}: {job.model.label} attends inside a sliding window of "
        f"{config.window} tokens, which is not supported: use at most {config.window}",
    )
    _check_heads(config, job, sizes)
    if sizes.pp > 1:
        _check_stages(config.layers, job, sizes.pp, stage_before)


def _check_heads(config: DecoderConfig, job: JobConfig, sizes: Degrees) -> None:
    flavor = f"of {job.model.label}"
    tensor = f"parallelism.tensor_parallel_degree = {sizes.tp} does not divide the"
    for count, what in (
        (config.heads, "heads"),
        (config.kv_heads, "key/value heads"),
        (config.mlp_dim, "columns of the MLP"),
    ):
        require(count % sizes.tp == 0, f"{tensor} {count} {what} {flavor}")
    require(64 % sizes.tp == 0, f"{tensor} vocabulary, which is padded to a multiple of 64")
    if sizes.cp > 1 and job.parallelism.context_parallel_method == "ulysses":
        local = config.kv_heads // sizes.tp
        require(
            local % sizes.cp == 0,
            "parallelism.context_parallel_method = ulysses: parallelism.context_parallel_degree = "
            f"{sizes.cp} does not divide "
            f"the {local} key/value heads a rank {flavor}; use allgather",
        )


def _check_stages(layers: int, job: JobConfig, pp: int, stage_before: bool) -> None:
    p = job.parallelism
    schedule, points = p.pipeline_parallel_schedule, p.pipeline_parallel_split_points
    per_rank = STAGES_PER_RANK[schedule]
    room = layers + stage_before
    require(
        pp * per_rank <= room,
        f"parallelism.pipeline_parallel_degree = {pp} makes {pp * per_rank} stages with {schedule}, but "
        f"{layers} decoder layers "
        f"fill at most {room}",
    )
    if not points:
        return
    key, stages = f"parallelism.pipeline_parallel_split_points = {points}", len(points) + 1
    first = 0 if stage_before else 1
    increasing = all(a < b for a, b in zip(points, points[1:], strict=False))
    require(
        increasing and first <= points[0] and points[-1] < layers,
        f"{key}: must increase, from {first} to at most {layers - 1}",
    )
    require(
        first == 1 or points[0] == 0,
        f"{key}: must begin with 0, since what feeds the decoder is a stage of its own",
    )
    # these schedules take any whole number of stages a rank, from two
    more = schedule.startswith("Interleaved")
    fits = stages % pp == 0 and stages // pp >= per_rank if more else stages == pp * per_rank
    allowed = f"{pp * per_rank}{' or a larger multiple of the ranks' if more else ''}"
    require(fits, f"{key}: makes {stages} stages, but {schedule} on {pp} ranks takes {allowed}")
