"""torch.compile, block by block: blocks of a tower share their code, so each kind is compiled once."""

from torch import nn


def apply_compile(blocks: nn.ModuleDict) -> None:
    """After activation checkpointing and before FSDP, whose gathers stay outside the graphs.

    Shapes never change here.
    """
    for block in blocks.values():
        block.compile(fullgraph=True, dynamic=False)
