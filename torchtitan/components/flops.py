"""Useful floating-point operations of training, by the rule of the PaLM paper (Chowdhery et al., 2022, appendix B).

A product with a matrix costs 2 per parameter and row going forward; going backward once more for the gradient of the
matrix, where it trains, and once for that of its input, where something before it trains. Attention costs 4 per allowed pair
of query and key and unit of width forward, and twice that backward; what a checkpointed or flash backward computes again
is not useful. Padding counts nothing, a causal mask counts its triangle, and only products are counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Backward:
    """Which gradients a piece of the model needs."""

    weights: bool
    inputs: bool

    @property
    def products(self) -> int:
        """Passes over a matrix product, forward included."""
        return 1 + self.weights + self.inputs

    @property
    def attention(self) -> int:
        return 3 if self.weights or self.inputs else 1


def matrix_parameters(module: nn.Module) -> int:
    """Parameters that multiply every row: embedding tables are looked up, not multiplied."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def product_flops(parameters: int, rows: int, backward: Backward) -> int:
    return 2 * parameters * rows * backward.products


def attention_flops(width: int, layers: int, pairs: int, backward: Backward) -> int:
    """`width`: heads times size of a head."""
    return 4 * width * layers * pairs * backward.attention


def causal_pairs(positions_BS: Tensor, document_ids_BS: Tensor) -> int:
    """Pairs of a query and a key that a causal mask inside each document allows: a token sees itself and those before it."""
    return int((positions_BS[document_ids_BS >= 0].long() + 1).sum())


def segment_pairs(starts: Tensor) -> int:
    """Pairs inside segments that lie one after the other; `starts`: bool, of all rows, padding left out."""
    cuts = torch.cat((starts.nonzero().flatten(), torch.tensor([starts.numel()])))
    return int(cuts.diff().square().sum())
