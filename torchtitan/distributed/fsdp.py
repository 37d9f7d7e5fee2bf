"""FSDP2: parameters, gradients and optimizer state divided over ranks, gathered when needed.

Unusual here: the loss is already divided by the tokens of the whole global step, so gradients are summed over
ranks, never averaged; a mean would be wrong wherever two towers are sharded over meshes of different sizes.
It is applied on one rank too: one code path, and mixed precision comes with it.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from torchtitan.config.job import JobConfig

# A linear layer's output is a view of its product, and no model here changes one in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


@dataclass(frozen=True)
class Sharding:
    """How parameters are stored and gathered, whichever mesh they are divided over."""

    param_dtype: torch.dtype  # of gathered parameters, hence of activations
    reduce_dtype: torch.dtype  # of gradients while they are summed over ranks
    # free the gathered parameters of a block after its forward, and gather again in backward
    reshard_after_forward: bool
    keep_last: bool  # the output layer stays gathered, since backward starts with it
    offload: bool  # keep the shards in host memory
    pin_memory: bool  # of offloaded shards; needs an accelerator

    @classmethod
    def of(cls, job: JobConfig) -> "Sharding":
        """The sharding that the job asks for."""
        policy = job.parallelism.fsdp_reshard_after_forward
        return cls(
            param_dtype=getattr(torch, job.training.mixed_precision_param),
            reduce_dtype=getattr(torch, job.training.mixed_precision_reduce),
            # A pipeline passes each block once per microbatch: gathering every time costs more than the
            # memory is worth.
            reshard_after_forward=policy == "always"
            or (policy == "default" and job.parallelism.pipeline_parallel_degree == 1),
            keep_last=policy != "always",
            offload=job.training.enable_cpu_offload,
            pin_memory=torch.cuda.is_available(),
        )


def shard(
    modules: nn.Module | Sequence[nn.Module], mesh: DeviceMesh, sharding: Sharding, last: bool = False
) -> None:
    """One group of `modules`' parameters that no inner group holds: gathered and freed together."""
    # Inputs are not cast: rotary angles stay float32, and pixels are cast by the encoder itself.
    precision = MixedPrecisionPolicy(sharding.param_dtype, sharding.reduce_dtype, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=sharding.pin_memory) if sharding.offload else OffloadPolicy()
    reshard = sharding.reshard_after_forward and not (last and sharding.keep_last)
    group = modules if isinstance(modules, nn.Module) else list(modules)
    fully_shard(group, mesh=mesh, reshard_after_forward=reshard, mp_policy=precision, offload_policy=offload)


def shard_blocks(blocks: Iterable[nn.Module], mesh: DeviceMesh, sharding: Sharding) -> None:
    """One group for each block."""
    for block in blocks:
        shard(block, mesh, sharding)


def free_gathered(root: nn.Module) -> None:
    """Free gathered parameters, as a backward does; a forward without one leaves them gathered.

    Otherwise a later forward that is replayed (CUDA graphs) would compute with parameters from before the
    optimizer's step, and the optimizer state could not be read under its names.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sum_gradients(root: nn.Module) -> None:
    """Add gradients over ranks. The factor alone would ask gloo for PREMUL_SUM, which it has not."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
