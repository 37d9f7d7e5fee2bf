"""A VLM over ranks, and its cache, for answers rather than training, or lent by a training run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.generate.forward import RankSlice, Share
from experiments.vlm.model.vlm import VLM
from experiments.vlm.parallelism.encoder_parallel import sharing_mesh
from experiments.vlm.parallelism.parallelize import apply_fsdp
from experiments.vlm.parallelism.sharing import sharers
from torchtitan.config.errors import UserError, require
from torchtitan.config.layout import Degrees
from torchtitan.distributed.collectives import agree_on_data
from torchtitan.distributed.compile import apply_compile, not_compiled
from torchtitan.distributed.fsdp import Sharding, free_gathered
from torchtitan.distributed.mesh import Mesh
from torchtitan.generation.kv_cache import KVCache
from torchtitan.models.decoder.parallelize import apply_tensor_parallel
from torchtitan.tools.signals import StopAsked, stop_asked


def check_layout(sizes: Degrees) -> None:
    """Raises ConfigError for a layout that cannot compute one token at a time."""
    for key, degree in (("context_parallel_degree", sizes.cp), ("pipeline_parallel_degree", sizes.pp)):
        require(
            degree == 1,
            f"parallelism.{key} = {degree}: answers are generated with data and tensor parallel alone; use 1",
        )


def parallelize_for_answers(model: VLM, mesh: Mesh, job: VLMJobConfig) -> None:
    """Tensor parallel without splitting the sequence, compile, FSDP. Each rank encodes its images alone.

    Parameters stay gathered after their first forward, so that not every token gathers them anew, unless
    parallelism.fsdp_reshard_after_forward is "always".
    """
    check_layout(mesh.degrees)
    assert model.encoder is not None
    if mesh.degrees.tp > 1:
        apply_tensor_parallel(model.decoder, mesh["tp"], split=False)
    if job.compile.enable:
        for tower in (model.encoder, model.decoder):
            apply_compile(tower.layers)
    sharding = Sharding.of(job)
    if job.parallelism.fsdp_reshard_after_forward != "always":
        sharding = replace(sharding, reshard_after_forward=False)
    apply_fsdp(model, mesh, mesh.enc, sharding)


def attach_cache(model: VLM, mesh: Mesh, job: VLMJobConfig, sequences: int, places: int) -> KVCache:
    """A cache in the precision of training's activations; a rank holds the heads that it computes.

    Raises UserError on all ranks where one has no room for it.
    """
    decoder, cache = model.config.decoder, KVCache(sequences, places, mesh.device)
    dtype = getattr(torch, job.training.mixed_precision_param)
    kv_heads, failed = decoder.kv_heads // mesh.degrees.tp, None
    try:
        cache.attach(model.decoder.layers.values(), kv_heads, decoder.head_dim, dtype)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        failed = UserError(
            f"no memory for {sequences} answers at one time of {places:,} tokens with their prompts: ask for "
            f"fewer (--sequences, validation.task_sequences) or shorter ones ({why})"
        )
    agree_on_data(True, failed)
    return cache


@contextmanager
def lent(model: VLM, mesh: Mesh, job: VLMJobConfig, sequences: int, places: int) -> Iterator[KVCache]:
    """Lend a model that trains for answers: a cache takes the place of its attention, that of context
    parallel too. Afterwards it is as it was.

    Answers come in more shapes than training has: nothing of it is compiled for them.
    """
    assert model.encoder is not None
    attentions: list[Any] = [block.attention for block in model.decoder.layers.values()]
    own = [attention.inner for attention in attentions]
    try:
        cache = attach_cache(model, mesh, job, sequences, places)
        model.eval()
        with not_compiled(model.encoder.layers), not_compiled(model.decoder.layers):
            yield cache
    finally:
        for attention, inner in zip(attentions, own, strict=True):
            attention.inner = inner
        model.train()
        free_gathered(model)


def share_in_training(mesh: Mesh, job: VLMJobConfig) -> Share:
    """This rank's share of a call where the model is laid out for training."""
    ranks = sharers(job, mesh.degrees)
    row = sharing_mesh(job, mesh).get_local_rank() if ranks > 1 else 0
    return Share(RankSlice(mesh.rank("tp"), mesh.degrees.tp), RankSlice(row, ranks))


def agreement(mesh: Mesh) -> Callable[[list[int]], list[int]]:
    """For an engine: the largest of each number over all ranks, which make the same calls.

    It raises StopAsked on all of them where a signal asks one to end its training.
    """

    def largest(mine: list[int]) -> list[int]:
        numbers = [*mine, int(stop_asked())]
        if dist.get_world_size() > 1:
            of_all = torch.tensor(numbers, device=mesh.device)
            dist.all_reduce(of_all, dist.ReduceOp.MAX)
            numbers = of_all.tolist()
        *agreed, stop = numbers
        if stop:
            raise StopAsked
        return agreed

    return largest
