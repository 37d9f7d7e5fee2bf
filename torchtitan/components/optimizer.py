"""AdamW for everything, or Muon for matrices and AdamW for the rest.

Frozen parameters are in no optimizer and keep no state.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.components.muon import Muon, sent_for_directions
from torchtitan.components.parameter_groups import Setting
from torchtitan.components.row_adamw import RowAdamW
from torchtitan.config.job import Optimizer
from torchtitan.layers.init import plain_name

Named = tuple[str, nn.Parameter]


KERNELS: dict[str, dict[str, bool]] = {
    "auto": {"fused": True},  # on CPU and GPU alike
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
}


def trainable(part: nn.Module) -> list[Named]:
    """Parameters that train, under their names in the plain model, whatever wraps its blocks."""
    named = part.named_parameters()
    return [(plain_name(name), parameter) for name, parameter in named if parameter.requires_grad]


def _is_muons(name: str, parameter: Tensor, options: Optimizer, adamw_only: tuple[str, ...]) -> bool:
    return options.name == "Muon" and parameter.ndim == 2 and not name.startswith(adamw_only)


def moments(
    named: Iterable[Named], options: Optimizer, adamw_only: tuple[str, ...], by_rows: Collection[str] = ()
) -> int:
    """Numbers of optimizer state of these parameters: two for an element, one where Muon moves it.

    `by_rows`: names of tables of which so few rows train that they count as none.
    """
    kept = [(name, p) for name, p in named if name not in by_rows]
    return sum(p.numel() * (2 - _is_muons(name, p, options, adamw_only)) for name, p in kept)


def sent_for_updates(
    named: Iterable[Named],
    options: Optimizer,
    adamw_only: tuple[str, ...],
    shards: int,
    tp: int,
    itemsize: int,
) -> float:
    """Bytes that a rank sends in a step to update these parameters, which FSDP divides over `shards`.

    `tp`: ranks of tensor parallel that hold the rest of each. `itemsize`: bytes of an element of an update.
    """
    muons = sum(p.numel() for name, p in named if _is_muons(name, p, options, adamw_only))
    return sent_for_directions(muons, shards, tp) * itemsize


def _adamw_groups(named: list[Named], of: Mapping[str, Setting]) -> list[dict]:
    """Vectors (norms, biases) are not decayed.

    One mesh a group: a fused kernel does not take tensors of several.
    """
    groups: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups[of[name].lr, of[name].weight_decay * (parameter.ndim >= 2), mesh].append(parameter)
    return [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay, _), group in groups.items()]


def _muon_groups(named: list[Named], of: Mapping[str, Setting]) -> list[dict]:
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        groups[of[name].muon_lr, of[name].weight_decay].append(parameter)
    return [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]


class Optimizers:
    """The optimizers of each part of the model that this rank holds, with the options of their making."""

    def __init__(
        self,
        parts: list[nn.Module],
        options: Optimizer,
        of: Mapping[str, Setting],
        adamw_only: tuple[str, ...],
        rates_on: torch.device | None = None,
    ):
        """`of`: the setting of each parameter that trains, by name (parameter_groups.py). `rates_on`: the
        device of learning rates as tensors, which a CUDA graph of the steps reads anew each time; None: plain
        numbers.
        """
        self.of_part = [
            _optimizers_of(trainable(part), options, of, adamw_only, rates_on is not None) for part in parts
        ]
        self.parameters = [parameter for part in parts for _, parameter in trainable(part)]
        self._made_with = [
            {name: option for name, option in group.items() if name != "params"} for group in self._groups()
        ]
        if rates_on is not None:
            for group in self._groups():
                group["lr"] = torch.tensor(group["lr"], device=rates_on)

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return (optimizer for optimizers in self.of_part for optimizer in optimizers)

    def _groups(self) -> Iterator[dict]:
        return (group for optimizer in self for group in optimizer.param_groups)

    def scale_learning_rates(self, factor: float) -> None:
        """Set the learning rate of each group to `factor` times its peak."""
        for group, made_with in zip(self._groups(), self._made_with, strict=True):
            kept, rate = group["lr"], made_with["lr"] * factor
            group.update(made_with, lr=kept.fill_(rate) if isinstance(kept, Tensor) else rate)

    def drop_frozen_rows(self) -> None:
        """Zero the gradients of rows that stay, in tables of which others train."""
        for optimizer in self:
            if isinstance(optimizer, RowAdamW):
                optimizer.drop_other_gradients()

    def step(self) -> None:
        """One step of each optimizer, on the gradients that are there."""
        for optimizer in self:
            optimizer.step()

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for optimizer in self:
            optimizer.zero_grad(set_to_none=True)


def _optimizers_of(
    named: list[Named],
    options: Optimizer,
    of: Mapping[str, Setting],
    adamw_only: tuple[str, ...],
    capturable: bool,
) -> list[torch.optim.Optimizer]:
    muons = [(name, p) for name, p in named if _is_muons(name, p, options, adamw_only)]
    tables = [(name, p) for name, p in named if of[name].rows is not None]
    chosen = {name for name, _ in (*muons, *tables)}
    rest = [(name, p) for name, p in named if name not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if muons:
        momentum, decay = options.muon_momentum, options.weight_decay
        optimizers.append(Muon(_muon_groups(muons, of), options.muon_lr, momentum, decay))
    if rest:
        optimizers.append(_adamw(_adamw_groups(rest, of), options, capturable))
    if tables:
        groups = [{"params": [p], "lr": of[name].lr, "rows": of[name].rows} for name, p in tables]
        optimizers.append(RowAdamW(groups, (options.beta1, options.beta2), options.eps))
    return optimizers


def _adamw(groups: list[dict], options: Optimizer, capturable: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        groups,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        capturable=capturable,
        **KERNELS[options.implementation],
    )
