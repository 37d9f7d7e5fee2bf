"""How many ranks of a context- and tensor-parallel group share the encoding of its images.

Imports no torch.
"""

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.config import ProjectorConfig
from torchtitan.config.float8 import Share
from torchtitan.config.layout import Degrees


def slots_a_forward(job: VLMJobConfig, sizes: Degrees) -> int:
    """Slots that pass through the model at once: those of a batch, or of a pipeline's microbatch."""
    return (
        job.parallelism.pipeline_parallel_microbatch_size if sizes.pp > 1 else job.training.local_batch_size
    )


def rows_a_forward(job: VLMJobConfig, sizes: Degrees) -> int:
    """Patch rows of those slots."""
    return slots_a_forward(job, sizes) * job.data.patch_rows


def rows_of_a_rank(job: VLMJobConfig, sizes: Degrees) -> tuple[float, float]:
    """Rows of a rank's matrices in one forward: tokens in the decoder, patches in the encoder (with its heads
    split over ranks, the patches that would cost as much).
    """
    patches = rows_a_forward(job, sizes) * job.data.patches_per_row / sharers(job, sizes)
    if job.parallelism.encoder_tensor_parallel:
        patches /= sizes.tp
    return slots_a_forward(job, sizes) * job.training.seq_len / (sizes.cp * sizes.tp), patches


def sharers(job: VLMJobConfig, sizes: Degrees) -> int:
    """How many ranks of a group encode each its share of the rows; 1 where the rows do not divide."""
    p = job.parallelism
    ranks = sizes.cp * (1 if p.encoder_tensor_parallel else sizes.tp)
    return ranks if p.encoder_sharing != "off" and rows_a_forward(job, sizes) % ranks == 0 else 1


def slot_sizes(job: VLMJobConfig) -> Degrees:
    """Sizes of a group of ranks that hold the same slots, alone."""
    p = job.parallelism
    return Degrees(1, 1, p.context_parallel_degree, p.tensor_parallel_degree, p.pipeline_parallel_degree)


def part_shares(job: VLMJobConfig, projector: ProjectorConfig) -> dict[str, Share]:
    """A rank's share of each part's products in a forward."""
    p, sizes = job.parallelism, slot_sizes(job)
    patches = rows_a_forward(job, sizes) // sharers(job, sizes) * job.data.patches_per_row
    # Tensor parallel gathers the sequence before it multiplies.
    tokens = slots_a_forward(job, sizes) * job.training.seq_len // sizes.cp
    return {
        "encoder": Share(patches, sizes.tp if p.encoder_tensor_parallel else 1),
        "projector": Share(patches // projector.merge_size**2),
        "decoder": Share(tokens, sizes.tp),
    }
