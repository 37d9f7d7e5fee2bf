"""Look before training: the whole configuration is checked, the model built without storage, one batch read, sizes printed."""

import torch

from torchtitan.build import describe, freeze
from torchtitan.components.optimizer import moments
from torchtitan.config.job import JobConfig
from torchtitan.config.layout import degrees, resolve_batch
from torchtitan.distributed.process_group import world_size
from torchtitan.spec import TrainSpec
from torchtitan.tools.hardware import GIB
from torchtitan.tools.logging import logger


def dry_run(job: JobConfig, spec: TrainSpec) -> None:
    """Every rank would do the same, so nobody else is asked. Raises ConfigError."""
    ranks = world_size()
    sizes, layout = resolve_batch(job, ranks), degrees(job.parallelism, ranks)
    tokenizer = spec.load_tokenizer(job)
    model = spec.build_model(job, tokenizer)
    freeze(model, job.training.freeze)
    describe(model, spec, sizes)
    weights = sum(parameter.numel() * (1 + parameter.requires_grad) for parameter in model.parameters())  # and their gradients
    shards = layout.dp_shard * layout.cp * layout.tp * layout.pp
    state = (weights + moments(model, job.optimizer, spec.adamw_only)) * torch.float32.itemsize / shards
    logger.info(f"weights, gradients and {job.optimizer.name} state: {state / GIB:.2f} GiB a rank, over {shards} shards")
    loader = spec.build_loader(job, tokenizer, rank=0, ranks=layout.dp, split="train", control=None, agree=None)
    try:
        batch = next(iter(loader)).batches[0]
    finally:
        loader.close()
    for name, tensor in batch.tensors.items():
        size = tensor.numel() * tensor.element_size() / 2**20
        logger.info(f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, {size:.1f} MiB")
    slots = len(batch.tensors[spec.labels])
    held = {name: 100 * batch.counts[name] / (size * slots) for name, size in spec.capacity(job).items()}
    logger.info("first batch: " + ", ".join(f"{name} {share:.1f}%" for name, share in held.items()))
    logger.info(f"{spec.flops(job, model)(batch) / 1e9:.1f} GFLOPs in it; dry run: nothing was trained")
