"""What the vision-language experiment brings to the trainer."""

from dataclasses import replace

import torch
from torch import Tensor

from experiments.vlm.batch import Delivered
from experiments.vlm.check import missing_data
from experiments.vlm.config import PARTS, VLMJobConfig
from experiments.vlm.costs.estimate import estimate
from experiments.vlm.costs.flops import count_flops
from experiments.vlm.data.batch_metrics import BATCH_METRICS, written_names
from experiments.vlm.data.controls import CONTROLS
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.setup import passes, sources_of
from experiments.vlm.evaluate.training_tasks import open_tasks
from experiments.vlm.model.vlm import VLM
from experiments.vlm.model_config import model_config
from experiments.vlm.parallelism.parallelize import parallelize_vlm
from experiments.vlm.parallelism.pipeline import pipeline_vlm
from experiments.vlm.parallelism.shard_batch import shard_batch, whole_slots
from experiments.vlm.parallelism.sharing import part_shares
from experiments.vlm.weights.embedding_rows import open_tokenizer, rows_of
from experiments.vlm.weights.export import export
from experiments.vlm.weights.initial_weights import initial_weights
from torchtitan.components.float8 import convert
from torchtitan.components.loader import Tensors
from torchtitan.components.lora import adapt
from torchtitan.components.metrics import Counts
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.components.validation import Scoring
from torchtitan.config.layout import Degrees
from torchtitan.distributed.estimate import Memory
from torchtitan.distributed.mesh import Mesh
from torchtitan.layers.attention import resolve_backend
from torchtitan.spec import TrainSpec
from torchtitan.tools.hardware import GIB
from torchtitan.tools.logging import logger

THIN = 3  # an image is thin when one side is at least this many times the other


def build_vlm(job: VLMJobConfig, tokenizer: Tokenizer | None) -> VLM:
    """The whole model, on the meta device."""
    config = model_config(job)
    backend = resolve_backend(job.model.attention_backend, "cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        chunk, sources = job.training.loss_chunk_tokens, len(sources_of(job, "train"))
        model = VLM(config, rows_of(job, tokenizer), backend, chunk, sources)
        adapt(model, job.lora)
        convert(model, job.float8, part_shares(job, config.projector))
    return model


def memory(job: VLMJobConfig, layout: Degrees, tokenizer: Tokenizer | None, on_gpu: bool) -> Memory:
    """Bytes of a rank at the peak, with the layers that `fit_memory` chose where there is a memory budget."""
    chosen = replace(job.activation_checkpoint, memory_budget_gib=0.0)
    job = replace(job, activation_checkpoint=chosen)
    return estimate(job, layout, rows_of(job, tokenizer), on_gpu).memory


def fit_memory(job: VLMJobConfig, layout: Degrees, tokenizer: Tokenizer | None) -> None:
    """Choose which layers are recomputed, where the job has a memory budget. Raises ConfigError."""
    if not job.activation_checkpoint.memory_budget_gib:
        return
    fitted = estimate(job, layout, rows_of(job, tokenizer))
    chosen, budget = fitted.job.activation_checkpoint, job.activation_checkpoint.memory_budget_gib
    job.activation_checkpoint = replace(chosen, memory_budget_gib=budget)
    towers = ", ".join(
        f"{name} {of.full_layers} layers full and {of.selective_layers} selective"
        for name, of in (("encoder", chosen.encoder), ("decoder", chosen.decoder))
    )
    peak = fitted.memory.total / GIB
    logger.info(f"recomputed for a memory budget of {budget:g} GiB: {towers}; estimated peak {peak:.1f} GiB")


def loss(model: torch.nn.Module, tensors: Tensors) -> Tensor:
    """Summed loss over this rank's labels, then that of each training source, float32 [1 + sources]."""
    return model(**tensors)


def score(model: torch.nn.Module, tensors: Tensors, mesh: Mesh) -> Tensor:
    """(nll, correct) of each label of whole slots, float32 [B, S, 2]."""
    return whole_slots(model(**tensors, per_token=True), tensors, mesh)


def counts(job: VLMJobConfig) -> Counts:
    """What the trainer adds up of the batches of this job."""
    ends = {source.name: passes(source, job) for source in sources_of(job, "train")}
    sources = tuple(ends)
    return Counts(
        loss_weight="loss_tokens",
        tokens="tokens",
        capacity={name: count.capacity(job) for name, count in BATCH_METRICS.items() if count.capacity},
        rates=tuple(name for name, count in BATCH_METRICS.items() if count.per_second),
        tallies=written_names(sources),
        sources=sources,
        held_out=tuple(source.name for source in sources_of(job, "validation")),
        passes={source: epochs for source, epochs in ends.items() if epochs is not None},
    )


def is_thin(sample: Delivered) -> bool:
    """Whether the sample has an image with one side at least THIN times the other."""
    return any(max(size) >= THIN * min(size) for size in sample.image_sizes)


SPEC = TrainSpec(
    name="vlm",
    parts=PARTS,
    load_tokenizer=open_tokenizer,
    model_config=model_config,
    initial_weights=initial_weights,
    export=export,
    build_model=build_vlm,
    memory=memory,
    fit_memory=fit_memory,
    parallelize=parallelize_vlm,
    pipeline=pipeline_vlm,
    build_loader=Loader,
    open_tasks=open_tasks,
    missing_data=missing_data,
    shard_batch=shard_batch,
    loss=loss,
    score=score,
    scoring=Scoring({"thin": is_thin}, {name: f"images {name}" for name in CONTROLS}),
    counts=counts,
    flops=lambda job, model: count_flops(model),
)
