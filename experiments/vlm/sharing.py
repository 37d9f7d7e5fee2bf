"""How many ranks of a context- and tensor-parallel group share the encoding of its images.

Imports no torch.
"""

from experiments.vlm.config import VLMJobConfig
from torchtitan.config.layout import Degrees


def rows_a_forward(job: VLMJobConfig, sizes: Degrees) -> int:
    """Patch rows that pass through the encoder at once: those of a batch, or of a pipeline's microbatch."""
    slots = (
        job.parallelism.pipeline_parallel_microbatch_size if sizes.pp > 1 else job.training.local_batch_size
    )
    return slots * job.data.patch_rows


def sharers(job: VLMJobConfig, sizes: Degrees) -> int:
    """How many ranks of a group encode each its share of the rows; 1 where the rows do not divide."""
    p = job.parallelism
    ranks = sizes.cp * (1 if p.encoder_tensor_parallel else sizes.tp)
    return ranks if p.encoder_sharing != "off" and rows_a_forward(job, sizes) % ranks == 0 else 1
