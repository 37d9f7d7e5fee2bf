"""Which parameters train: all but those that training.freeze names.

A pattern is a regular expression that is looked for anywhere in a parameter's name, so the name of a part
(`encoder`) is one too. A few rows of a frozen token table may train (training.trainable_tokens): such a table
has a gradient, whose other rows are dropped before it is used (row_adamw.py).
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.errors import ConfigError, did_you_mean, require
from torchtitan.config.job import Training
from torchtitan.layers.lora import is_adapters

NEW = "new"  # in training.trainable_tokens: what the tokenizer's file does not have


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
    """Freeze what the patterns match, adapters excepted. Raises ConfigError where one matches nothing."""
    for pattern in patterns:
        for name, parameter in matching(model, pattern, "training.freeze").items():
            parameter.requires_grad_(parameter.requires_grad and is_adapters(name))


def choose_trained(model: Any, options: Training) -> None:
    """`model`: a whole Model (spec.py).

    Raises ConfigError where a pattern matches nothing, all together match everything, or tables that would
    train whole are to train by rows.
    """
    freeze(model, options.freeze)
    if options.trainable_tokens:
        key = f"training.trainable_tokens = {' '.join(options.trainable_tokens)}"
        tables = {name: model.get_parameter(name) for name in model.TOKEN_TABLES}
        for name, table in tables.items():
            require(not table.requires_grad, f"{key}: all rows of {name} train; freeze it, or leave this out")
        for table in tables.values():
            table.requires_grad_(True)
    trains = any(parameter.requires_grad for parameter in model.parameters())
    patterns = " ".join(options.freeze)
    require(trains, f"training.freeze = {patterns}: matches every parameter; nothing would train")


def rows_of(tokens: Sequence[str], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of training.trainable_tokens, ascending. Raises ConfigError for a token that is not there."""
    rows: set[int] = set()
    for token in tokens:
        id, key = tokenizer.special_id(token), f"training.trainable_tokens = {token}"
        if token == NEW:
            require(bool(tokenizer.new_ids), f"{key}: the tokenizer's file lacks no token; leave this out")
            rows |= tokenizer.new_ids
        elif id is None:
            raise ConfigError(f"{key}: no special token{did_you_mean(token, [NEW, *tokenizer.specials])}")
        else:
            rows.add(id)
    return tuple(sorted(rows))
