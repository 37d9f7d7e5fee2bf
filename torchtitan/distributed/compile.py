"""torch.compile, block by block: blocks of a tower share their code, so each kind is compiled once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def apply_compile(blocks: nn.ModuleDict) -> None:
    """Compile each block, after activation checkpointing and before FSDP, whose gathers stay outside.

    Shapes never change here.
    """
    for block in blocks.values():
        block.compile(fullgraph=True, dynamic=False)


@contextmanager
def not_compiled(blocks: nn.ModuleDict) -> Iterator[None]:
    """Run the blocks eagerly, for shapes that training does not have; what was compiled is kept."""
    modules: list[Any] = list(blocks.values())
    compiled = [block._compiled_call_impl for block in modules]
    for block in modules:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in zip(modules, compiled, strict=True):
            block._compiled_call_impl = call
