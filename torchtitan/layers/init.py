"""Initial weights that do not depend on how the model is sharded.

Each parameter is drawn whole from a generator seeded by the run's seed and the parameter's name, and a rank
keeps its shard: one process, FSDP, tensor and pipeline parallel all start from the same numbers. One whole
parameter at a time is in memory.
"""

import zlib
from collections.abc import Callable, Collection

import torch
from torch import Generator, Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Fill = Callable[[Tensor, Generator], object]


def fan_in(gain: float = 1.0) -> Fill:
    """Normal with deviation gain / sqrt(columns): a linear map that keeps the scale of what it reads."""
    return lambda x, generator: x.normal_(0.0, gain / x.shape[-1] ** 0.5, generator=generator)


def constant(value: float) -> Fill:
    """Fills a parameter with one value."""
    return lambda x, generator: x.fill_(value)


def plain_name(name: str) -> str:
    """The name of a parameter in the plain model, whatever wraps its blocks (checkpointing, compile)."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


@torch.no_grad()
def initialise(
    model: nn.Module, rule: Callable[[str], Fill], seed: int, without: Collection[str] = ()
) -> None:
    """Fill all parameters but `without` by the `rule` for their names; tied ones once, under the first."""
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        if name in without:
            continue
        generator = Generator(parameter.device).manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        rule(name)(whole, generator)
        if isinstance(parameter, DTensor):
            # Every rank drew the same numbers, so nothing is sent.
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(whole)
