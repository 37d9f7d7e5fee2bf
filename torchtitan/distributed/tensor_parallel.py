"""Tensor parallel in PyTorch's styles, and one that it has not: an output layer with the loss.

Weights become DTensors, split by columns (what a layer makes) or rows (what it reads). Between blocks the
sequence is split (sequence parallel; Korthikanti et al., 2022): a block gathers it, and scatters the sum of
the ranks' results.
"""

from typing import Any

import torch
import torch._inductor.config
from torch import nn
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchtitan.distributed.differentiable import gather, sum_gradient
from torchtitan.distributed.imagined import ImaginedGroup, through
from torchtitan.layers.lora import LoRALinear


def split(module: nn.Module, mesh: DeviceMesh | ImaginedGroup, plan: dict[str, ParallelStyle]) -> None:
    """Give each submodule that `plan` names its style."""
    if isinstance(mesh, ImaginedGroup):
        for name, style in plan.items():
            _imagine(module.get_submodule(name), style, mesh)
        return
    adapters = {name: _take_adapter(module.get_submodule(name)) for name in plan}
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    parallelize_module(module, mesh, plan)
    for name, adapter in adapters.items():
        if adapter is not None:
            _lay_out(adapter, plan[name], mesh)
            module.get_submodule(name).lora = adapter
    for name in frozen:
        # PyTorch's sequence parallel style makes new parameters, which would train again.
        module.get_parameter(name).requires_grad_(False)


def _take_adapter(module: nn.Module) -> nn.Module | None:
    """Take the adapter off: PyTorch's styles would take its factors for weights of the map itself."""
    return module._modules.pop("lora") if isinstance(module, LoRALinear) else None


def _lay_out(adapter: nn.Module, style: ParallelStyle, mesh: DeviceMesh) -> None:
    """Divide an adapter (layers/lora.py): B like the outputs that a rank makes, or A like its inputs."""
    by_columns = isinstance(style, ColwiseParallel)
    placements = {"A": Replicate() if by_columns else Shard(1), "B": Shard(0) if by_columns else Replicate()}
    for name, placement in placements.items():
        factor: Any = adapter.get_submodule(name)
        factor.weight = nn.Parameter(distribute_tensor(factor.weight, mesh, [placement]))


def embedding(split: bool = True) -> ParallelStyle:
    """Each rank holds some rows of the table; the looked-up vectors are summed and come out split along the
    sequence, or whole on every rank.
    """
    return RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1) if split else Replicate())


def norm(to_local: bool = False) -> ParallelStyle:
    """A norm on the rank's part of the sequence.

    The weight is whole on every rank, and its gradient a sum over them.
    """
    return SequenceParallel(use_local_output=to_local)


def head_norm() -> ParallelStyle:
    """A norm on the rank's heads [B, S, H, E], which `columns(to_local=False)` made."""
    return SequenceParallel(sequence_dim=2, use_local_output=True)


def gathered(arguments: int, split: bool = True) -> ParallelStyle:
    """The first of `arguments` becomes whole on every rank, from parts of the sequence or equal copies.

    Backward adds what the layers that read it found, once for all of them.
    """
    rest = (None,) * (arguments - 1)
    return PrepareModuleInput(
        input_layouts=(Shard(1) if split else Replicate(), *rest),
        desired_input_layouts=(Replicate(), *rest),
        use_local_output=False,
    )


def columns(to_local: bool = True) -> ParallelStyle:
    """Output features are divided over ranks. `to_local`: they come out as a plain tensor, not a DTensor."""
    return ColwiseParallel(use_local_output=to_local)


def rows(split: bool = True) -> ParallelStyle:
    """Input features are divided over ranks. Their sum comes out split along the sequence, or whole."""
    return RowwiseParallel(output_layouts=Shard(1) if split else Replicate())


def overlap_with_products(mesh: DeviceMesh) -> None:
    """Asynchronous tensor parallel, in compiled blocks, for GPUs that can read each other's memory.

    Gathers and scatters are cut into pieces, which travel while matrix products of others run (Wang et al.,
    2022).
    """
    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


class VocabularyParallel(ParallelStyle):
    """For LMHead: each rank holds rows of the weight, and scores all tokens of the sequence with them.

    The head itself crosses the group with three numbers a token (layers/cross_entropy.py), never with logits.
    """

    def __init__(self, split: bool = True):
        """`split`: tokens come split along the sequence; else all of them on every rank."""
        super().__init__()
        self.split = split

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        head: Any = module
        head.vocab_group = group = device_mesh.get_group()
        head.weight = nn.Parameter(
            distribute_tensor(head.weight, device_mesh, [Shard(0)]), head.weight.requires_grad
        )
        # The gradient of each rank's columns is a part of a sum, which the gather's backward adds up.
        if self.split:
            head.register_forward_pre_hook(lambda module, inputs: (gather(inputs[0], 1, group), *inputs[1:]))
        return module


def _imagine(module: nn.Module, style: ParallelStyle, group: ImaginedGroup) -> None:
    """What `style` leaves of a plain module on one rank, and what crosses the group; no DTensors."""
    if isinstance(style, VocabularyParallel):
        _keep_part(module, 0, group)
        module.register_forward_pre_hook(lambda module, inputs: (gather(inputs[0], 1, group), *inputs[1:]))
    elif isinstance(style, ColwiseParallel):
        _keep_part(module, 0, group)
    elif isinstance(style, RowwiseParallel):
        _keep_part(module, 0 if isinstance(module, nn.Embedding) else 1, group)
        is_split = style.output_layouts[0] == Shard(1)
        module.register_forward_hook(
            lambda module, inputs, x: _scatter_sum(x, group) if is_split else _sum(x, group)
        )
    elif isinstance(style, PrepareModuleInput):
        is_split = style.input_layouts is not None and style.input_layouts[0] == Shard(1)
        bring = (lambda x: gather(x, 1, group)) if is_split else (lambda x: sum_gradient(x, group))
        module.register_forward_pre_hook(lambda module, inputs: (bring(inputs[0]), *inputs[1:]))
    else:
        assert isinstance(style, SequenceParallel), f"nothing is known of {style}"  # whole on every rank


def _keep_part(module: nn.Module, dim: int, group: ImaginedGroup) -> None:
    """Divides the weight along `dim`, the bias where that is divided too, and of an adapter one factor."""
    if isinstance(module, LoRALinear):
        _keep_part(module.lora.A if dim else module.lora.B, dim, group)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if dim < parameter.ndim:
            part = parameter.detach().chunk(group.size(), dim)[0].clone()
            setattr(module, name, nn.Parameter(part, parameter.requires_grad))


def _sum(x: torch.Tensor, group: ImaginedGroup) -> torch.Tensor:
    return through(x, group, "all-reduce")


def _scatter_sum(x_BSD: torch.Tensor, group: ImaginedGroup) -> torch.Tensor:
    """The ranks' sum, of which each gets a part of the sequence."""
    parts = torch.cat(x_BSD.chunk(group.size(), 1))
    return through(parts, group, "reduce-scatter", "all-gather")
