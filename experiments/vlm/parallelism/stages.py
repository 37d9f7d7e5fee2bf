"""How the layers of a VLM lie on the stages of a pipeline."""

from collections.abc import Iterable

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.vlm import VLM
from experiments.vlm.parallelism.sharing import rows_of_a_rank
from torchtitan.components.flops import backward_of, forward_flops, product_flops, total_of
from torchtitan.config.layout import Degrees
from torchtitan.config.recomputation import Recomputation
from torchtitan.distributed.stages import Split, number_of_stages, split_evenly


def split_layers(model: VLM, job: VLMJobConfig, sizes: Degrees) -> Split:
    """By parallelism.pipeline_parallel_split_points, else so that the slowest stage is as fast as possible.

    `model` is whole, on any device, and frozen where the job freezes it.
    """
    p, layers = job.parallelism, model.config.decoder.layers
    if p.pipeline_parallel_split_points:
        return Split(layers, tuple(p.pipeline_parallel_split_points))
    stages = number_of_stages(p.pipeline_parallel_schedule, sizes.pp)
    each, first, last = stage_costs(model, job, sizes)
    return Split(layers, tuple(split_evenly(each, first, last, stages, p.pipeline_parallel_encoder_stage)))


def stage_costs(model: VLM, job: VLMJobConfig, sizes: Degrees) -> tuple[list[float], float, float]:
    """FLOPs of a rank for a microbatch: of each decoder layer, of all before them, of the output layer.

    Those of every matrix (torchtitan/components/flops.py), and those that checkpointing computes again.
    Attention is left out: what documents and images look like is not known here, and it is small next to the
    products.
    """
    assert model.encoder is not None and model.projector is not None
    forward, products, ac = forward_flops(model), product_flops(model), job.activation_checkpoint
    tokens, patches = rows_of_a_rank(job, sizes)

    def cost(part: str) -> float:
        return total_of(part, products)

    def costs(tower: str, layers: Iterable[str], recomputation: Recomputation) -> list[float]:
        names = [f"{tower}.layers.{number}" for number in layers]
        # products are computed again where only inputs are kept
        again = [recomputation.kept(number) == "inputs" for number in layers]
        # A layer without a backward computes nothing again.
        return [
            cost(name) + (cost(name) > total_of(name, forward)) * total_of(name, forward) * repeats
            for name, repeats in zip(names, again, strict=True)
        ]

    running = [number for number in model.encoder.layers if int(number) < model.encoder.depth]
    encoder = cost("encoder.embedding") + sum(costs("encoder", running, ac.encoder))
    visual = cost("projector") / model.projector.merged
    decoder = costs("decoder", model.decoder.layers, ac.decoder)
    return [tokens * each for each in decoder], patches * (encoder + visual), tokens * cost("decoder.output")


def sends_back(model: VLM, split: Split, schedule: str) -> list[bool]:
    """Whether each stage sends a gradient back: where something trains in those before it.

    `model` is whole, and frozen where the job freezes it. Schedules that split backward find the gradients of
    weights on the way from an input that needs one, and lose them without an error where none does.
    """
    if schedule.endswith("ZeroBubble"):
        return [stage > 0 for stage in range(split.stages)]
    wants = backward_of(model)
    later = [split.of(stage) for stage in range(1, split.stages)]
    firsts = [f"decoder.layers.{layers.start}" if layers else "decoder.norm" for layers in later]
    return [False, *(wants[first].inputs for first in firsts)]
