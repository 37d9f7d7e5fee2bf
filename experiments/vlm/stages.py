"""How the layers of a VLM lie on the stages of a pipeline."""

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.vlm import VLM
from experiments.vlm.sharing import rows_a_forward, sharers
from torchtitan.components.flops import forward_flops, product_flops, total_of
from torchtitan.config.layout import Degrees
from torchtitan.distributed.stages import Split, number_of_stages, split_evenly


def split_layers(model: VLM, job: VLMJobConfig, sizes: Degrees) -> Split:
    """By parallelism.pipeline_parallel_split_points, else so that the slowest stage takes as little as it
    can.

    `model` is whole, on any device, and frozen where the job freezes it.
    """
    p, layers = job.parallelism, model.config.decoder.layers
    if p.pipeline_parallel_split_points:
        return Split(layers, tuple(p.pipeline_parallel_split_points))
    stages = number_of_stages(p.pipeline_parallel_schedule, sizes.pp)
    layer, first, last = stage_costs(model, job, sizes)
    return Split(
        layers, tuple(split_evenly([layer] * layers, first, last, stages, p.pipeline_parallel_encoder_stage))
    )


def stage_costs(model: VLM, job: VLMJobConfig, sizes: Degrees) -> tuple[float, float, float]:
    """FLOPs of a rank for one microbatch: of a decoder layer, of what comes before the layers, of the output
    layer.

    Those of every matrix (torchtitan/components/flops.py), and those that checkpointing computes again.
    Attention is left out: what documents and images look like is not known here, and it is small next to the
    products.
    """
    assert model.projector is not None
    forward, products, ac = forward_flops(model), product_flops(model), job.activation_checkpoint
    tokens = job.parallelism.pipeline_parallel_microbatch_size * job.training.seq_len / (sizes.cp * sizes.tp)
    patches = rows_a_forward(job, sizes) * job.data.patches_per_row / sharers(job, sizes)
    if job.parallelism.encoder_tensor_parallel:
        patches /= sizes.tp

    def cost(part: str, mode: str = "none") -> float:
        once, passes = total_of(part, forward), total_of(part, products)
        # What has no backward computes nothing again.
        return passes + (passes > once) * computed_again(mode, ac.selective_ac_option) * once

    encoder = cost("encoder.embedding") + cost("encoder.layers", ac.encoder_mode)
    visual = cost("projector") / model.projector.merged
    return (
        tokens * cost("decoder.layers.0", ac.mode),
        patches * (encoder + visual),
        tokens * cost("decoder.output"),
    )


def computed_again(mode: str, option: str) -> float:
    """The share of a tower's matrix products that backward computes again (activation_checkpoint.py)."""
    if mode == "selective":
        return 0 if option == "op" else 1 / int(option)
    return float(mode == "full")
