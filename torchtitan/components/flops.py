"""Useful FLOPs of training, by the rule of PaLM (Chowdhery et al., 2022, appendix B).

A product with a matrix costs 2 per parameter and row going forward; going backward once more for the gradient
of the matrix, where it trains, and once for that of its input, where something before it trains. Attention
costs 4 per allowed pair of query and key and unit of width forward, and twice that backward; what a
checkpointed or flash backward computes again is not useful. Padding counts nothing, a causal mask counts its
triangle, and only products are counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchtitan.layers.attention import InnerAttention


@dataclass(frozen=True)
class Backward:
    """Which gradients a module needs: of any weight of its own, and of what it is given."""

    weights: bool
    inputs: bool

    @property
    def attention(self) -> int:
        """Passes over the scores, forward included. Backward finds the gradients of q, k and v together."""
        return 3 if self.inputs else 1


def backward_of(model: nn.Module) -> dict[str, Backward]:
    """What each module computes in backward, by name: the one rule for what freezing saves.

    A module's input needs a gradient where something before it trains. So modules must be registered in the
    order in which they run; those that read what their parent reads, side by side, are named in its
    `SAME_INPUT`. A table reads numbers of rows, which have no gradient.
    """
    found: dict[str, Backward] = {}
    _visit("", model, False, found)
    return found


def _visit(name: str, module: nn.Module, reads: bool, found: dict[str, Backward]) -> bool:
    """`reads`: whether the input needs a gradient. Returns whether the output needs one."""
    trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    found[name] = Backward(weights=trains, inputs=reads)
    so_far = reads or trains
    for child_name, child in module.named_children():
        given = reads if child_name in getattr(module, "SAME_INPUT", ()) else so_far
        given = given and not isinstance(child, nn.Embedding)
        so_far |= _visit(f"{name}.{child_name}" if name else child_name, child, given, found)
    return so_far


def forward_flops(model: nn.Module) -> dict[str, int]:
    """FLOPs of each matrix, by name, for one row. Embedding tables are looked up, not multiplied."""
    return {name: 2 * m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def product_flops(model: nn.Module) -> dict[str, int]:
    """FLOPs of each matrix, by name, for one row, forward and backward."""
    backward, passes = backward_of(model), {}
    for name, flops in forward_flops(model).items():
        trains = model.get_parameter(f"{name}.weight").requires_grad
        passes[name] = flops * (1 + trains + backward[name].inputs)
    return passes


def attention_passes(model: nn.Module) -> dict[str, int]:
    """Passes over the scores of each layer, by the name of its attention, forward included."""
    backward = backward_of(model)
    names = [name for name, module in model.named_modules() if isinstance(module, InnerAttention)]
    return {name: backward[name].attention for name in names}


def total_of(part: str, counted: dict[str, int]) -> int:
    """What was counted in the module `part` and all inside it."""
    inside = f"{part}."
    return sum(count for name, count in counted.items() if name == part or name.startswith(inside))


def causal_pairs(positions_BS: Tensor, document_ids_BS: Tensor) -> int:
    """Pairs that a causal mask inside each document allows: a token sees itself and those before."""
    return int((positions_BS[document_ids_BS >= 0].long() + 1).sum())


def segment_pairs(starts: Tensor) -> int:
    """Pairs inside segments that lie one after the other; `starts`: bool, of all rows, padding left out."""
    cuts = torch.cat((starts.nonzero().flatten(), torch.tensor([starts.numel()])))
    return int(cuts.diff().square().sum())
