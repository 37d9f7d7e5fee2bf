"""Learning rate and weight decay of each parameter: those of its [[optimizer.groups]], else of [optimizer].

A parameter belongs to the first group whose pattern is found in its name. Layer-wise decay as in BEiT (Bao et
al., 2022): of a tower with n layers, what comes before them is layer 0 and what comes after layer n + 1, and
layer i has layer_decay ** (n + 1 - i) of the group's learning rate.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from torchtitan.components.freezing import matching
from torchtitan.config.errors import require
from torchtitan.config.job import Optimizer, ParameterGroup

IN_LAYER = re.compile(r"(.*)\.layers\.(\d+)\..*")


@dataclass(frozen=True)
class Setting:
    """What an optimizer needs to know of a parameter. Learning rates are peaks."""

    lr: float  # of AdamW
    muon_lr: float
    weight_decay: float  # of matrices
    rows: tuple[int, ...] | None = None  # of a table, those that train; None: all

    def scaled(self, factor: float) -> "Setting":
        """With `factor` times the learning rates."""
        return replace(self, lr=self.lr * factor, muon_lr=self.muon_lr * factor)


def setting_of(options: Optimizer, group: ParameterGroup | None = None) -> Setting:
    """The setting of a group, before its layer-wise decay; without a group, that of the other parameters."""
    own = Setting(options.lr, options.muon_lr, options.weight_decay)
    if group is None:
        return own
    given = {name: getattr(group, name) for name in ("lr", "muon_lr", "weight_decay")}
    changed = replace(own, **{name: value for name, value in given.items() if value is not None})
    return changed.scaled(group.schedule_factor)


def settings(model: Any, options: Optimizer, token_rows: tuple[int, ...] = ()) -> dict[str, Setting]:
    """The setting of every parameter that trains, by name. `model`: a whole Model (spec.py), frozen where it
    is to be. `token_rows`: the only rows of its token tables that train.

    Raises ConfigError where a group has none of them, or decays by layers where there are none.
    """
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    found = dict.fromkeys(trained.values(), setting_of(options))
    for number, group in enumerate(options.groups):
        key = f"optimizer.groups[{number}].pattern"
        matched = matching(model, group.pattern, key).values()
        names = [trained.pop(id(parameter)) for parameter in matched if id(parameter) in trained]
        why = "all that it matches is frozen, or has a group before this one"
        require(bool(names), f"{key} = {group.pattern}: {why}; leave it out")
        setting = setting_of(options, group)
        factors = {name: layer_factor(model, name, group.layer_decay) for name in names}
        found |= {name: setting.scaled(factor or 1.0) for name, factor in factors.items()}
        layered = group.layer_decay == 1 or any(factor is not None for factor in factors.values())
        require(
            layered,
            f"optimizer.groups[{number}].layer_decay = {group.layer_decay}: {group.pattern} has no layers",
        )
    tables = [name for name in model.TOKEN_TABLES if token_rows and name in found]
    return found | {name: replace(found[name], rows=token_rows) for name in tables}


def layer_factor(model: nn.Module, name: str, decay: float) -> float | None:
    """Share of the learning rate that layer-wise decay leaves a parameter; None in a part without layers."""
    part_name, _, rest = name.partition(".")
    children = [child for child, _ in model.get_submodule(part_name).named_children()]
    if "layers" not in children:
        return None
    layers = len(list(model.get_submodule(f"{part_name}.layers").children()))
    within = IN_LAYER.fullmatch(name)
    if within:
        depth = int(within[2]) + 1
    else:
        depth = 0 if children.index(rest.partition(".")[0]) < children.index("layers") else layers + 1
    return decay ** (layers + 1 - depth)


def peak_rates(options: Optimizer) -> Mapping[str, float]:
    """The learning rate of each group, by the name that metrics give it, before layer-wise decay."""
    of_group = {"": setting_of(options)}
    of_group |= {f"/{group.name or group.pattern}": setting_of(options, group) for group in options.groups}
    rates = {f"lr{name}": setting.lr for name, setting in of_group.items()}
    if options.name == "Muon":
        rates |= {f"muon_lr{name}": setting.muon_lr for name, setting in of_group.items()}
    return rates
