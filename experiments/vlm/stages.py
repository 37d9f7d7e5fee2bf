"""How the layers of a VLM lie on the stages of a pipeline. Imports no torch."""

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.flavors import VLMConfig
from experiments.vlm.model.sizes import encoder_parameters, projector_parameters
from experiments.vlm.sharing import rows_a_forward, sharers
from torchtitan.config.layout import Degrees
from torchtitan.distributed.stages import Split, number_of_stages, split_evenly
from torchtitan.models.decoder.sizes import layer_parameters


def split_layers(config: VLMConfig, vocab_size: int, job: VLMJobConfig, sizes: Degrees) -> Split:
    """By parallelism.pipeline_parallel_split_points, else so that no stage takes longer than it must."""
    p, layers = job.parallelism, config.decoder.layers
    if p.pipeline_parallel_split_points:
        return Split(layers, tuple(p.pipeline_parallel_split_points))
    stages = number_of_stages(p.pipeline_parallel_schedule, sizes.pp)
    layer, first, last = stage_costs(config, vocab_size, job, sizes)
    return Split(layers, tuple(split_evenly([layer] * layers, first, last, stages, p.pipeline_parallel_encoder_stage)))


def stage_costs(config: VLMConfig, vocab_size: int, job: VLMJobConfig, sizes: Degrees) -> tuple[float, float, float]:
    """FLOPs of a rank for one microbatch: of a decoder layer, of what stage 0 does before its layers, of the output layer.

    2 a parameter and row, times the passes: 1 forward, one more where checkpointing computes it again, 2 backward (none through a
    frozen encoder, 1 through a frozen decoder). Attention is left out: what documents and
    images look like is not known here, and it is small beside the products.
    """
    p, frozen, ac = job.parallelism, job.training.freeze, job.activation_checkpoint
    tokens = p.pipeline_parallel_microbatch_size * job.training.seq_len / (sizes.cp * sizes.tp)
    patches = rows_a_forward(job, sizes) * job.data.patches_per_row / sharers(job, sizes)
    if p.encoder_tensor_parallel:
        patches /= sizes.tp
    passes = 2 if "decoder" in frozen else 3
    encoder_passes = 1 if "encoder" in frozen else 3 + computed_again(ac.encoder_mode, ac.selective_ac_option)
    encoder = encoder_passes * encoder_parameters(config.encoder)
    merged = job.data.spatial_merge_size**2
    projector = 3 * projector_parameters(config.projector, config.encoder.dim, job.data.spatial_merge_size, config.decoder.dim) / merged
    layer = 2 * (passes + computed_again(ac.mode, ac.selective_ac_option)) * tokens * layer_parameters(config.decoder)
    output = 2 * passes * tokens * config.decoder.dim * vocab_size
    return layer, 2 * patches * (encoder + projector), output


def computed_again(mode: str, option: str) -> float:
    """The share of a tower's matrix products that backward computes again (activation_checkpoint.py)."""
    if mode == "selective":
        return 0 if option == "op" else 1 / int(option)
    return float(mode == "full")
