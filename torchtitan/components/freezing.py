"""Which parameters train: all but those that training.freeze names.

A pattern is a regular expression that is looked for anywhere in a parameter's name, so the name of a part
(`encoder`) is one too.
"""

import re
from collections.abc import Sequence

from torch import nn

from torchtitan.config.errors import ConfigError, did_you_mean


def matching(model: nn.Module, pattern: str, key: str) -> dict[str, nn.Parameter]:
    """Parameters of a plain model that the pattern finds, by name; one with two names (tied) by either.

    Raises ConfigError, which names the option `key`, where there are none.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    found = {name: parameter for name, parameter in named.items() if re.search(pattern, name)}
    if not found:
        parts = [name for name, _ in model.named_children()]
        *_, example = named
        raise ConfigError(
            f"{key} = {pattern}: matches no parameter (one is called {example}){did_you_mean(pattern, parts)}"
        )
    return found


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take gradients from what the patterns match. Raises ConfigError where one matches nothing,
    or all match everything.
    """
    for pattern in patterns:
        for parameter in matching(model, pattern, "training.freeze").values():
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"training.freeze = {' '.join(patterns)}: matches every parameter; nothing would train"
        )
