"""Low-rank adaptation (LoRA; Hu et al., 2021): a frozen linear map, plus a small one that trains.

    y = W x + b + (alpha / rank) B A dropout(x)        A [rank, in] random, B [out, rank] zero at first

Unusual here: the map keeps its name and its weight, so that files and layouts know it as before; the new
parameters stand below it as `lora.A` and `lora.B`. Under tensor parallel the factors lie as the weight does,
B by its columns' outputs or A by its rows' inputs, and the other is whole: the update is a part like the
map's own result, so nothing more is sent for it.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

INFIX = ".lora."  # in the names of the weights that are not the base's


@dataclass(frozen=True)
class Shape:
    """Sizes of an adapter, whatever map it adapts."""

    rank: int
    alpha: float
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / self.rank


class Adapter(nn.Module):
    """The update of a linear map: scale * B(A(dropout(x)))."""

    def __init__(self, inputs: int, outputs: int, shape: Shape):
        super().__init__()
        self.scale = shape.scale
        self.dropout = nn.Dropout(shape.dropout)
        self.A = nn.Linear(inputs, shape.rank, bias=False)
        self.B = nn.Linear(shape.rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; under tensor parallel this rank's part of either."""
        return self.scale * F.linear(F.linear(self.dropout(x), _local(self.A.weight)), _local(self.B.weight))


class LoRALinear(nn.Linear):
    """A linear map with an adapter `lora`."""

    SAME_INPUT = ("lora",)  # see backward_of
    lora: Adapter

    @classmethod
    def around(cls, base: nn.Linear, shape: Shape) -> "LoRALinear":
        """`base` with an adapter; the parameters are those of `base` itself."""
        adapted = cls(base.in_features, base.out_features, base.bias is not None)
        adapted.weight, adapted.bias = base.weight, base.bias
        adapted.lora = Adapter(base.in_features, base.out_features, shape)
        return adapted

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        out = super().forward(x)
        update = self.lora(_local(x))
        if isinstance(out, DTensor):
            update = DTensor.from_local(update, out.device_mesh, out.placements, run_check=False)
        return out + update


def _local(x: Tensor) -> Tensor:
    """This rank's part. What is whole on every rank has a gradient that is a part of a sum over them."""
    if not isinstance(x, DTensor):
        return x
    return x.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in x.placements])


def is_adapters(name: str) -> bool:
    """Whether a weight of this name belongs to an adapter."""
    return INFIX in name


def scale_of(model: nn.Module) -> float | None:
    """What the updates of adapters are multiplied by; None where there are none."""
    return next((module.scale for module in model.modules() if isinstance(module, Adapter)), None)


def names_of(weight: str) -> tuple[str, str]:
    """Names of A and B of the adapter of a map, from the name of its weight."""
    module = weight.removesuffix(".weight")
    return f"{module}{INFIX}A.weight", f"{module}{INFIX}B.weight"


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The weight of the map and its update in one, in the weight's dtype; added in float32."""
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)
