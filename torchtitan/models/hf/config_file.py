"""Values of a config.json. Imports no torch, so that a wrong folder is refused before anything heavy loads.

Published files are sparse: what is missing, or null, is the default of the class of that model_type, which
the caller names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torchtitan.config.errors import ConfigError, require
from torchtitan.config.table import EXPECTED
from torchtitan.tools.hub import get_it

CONFIG = "config.json"
Value = TypeVar("Value", bool, int, float, str)


@dataclass(frozen=True)
class ConfigFile:
    """The values of a file, or of a section in it. `where`: the file, and the section, for errors."""

    values: Mapping[str, Any]
    where: str

    def get(self, key: str, default: Value) -> Value:
        """The value as the type of its default. Raises ConfigError where it is of another."""
        value, kind = self.values.get(key), type(default)
        if value is None:
            return default
        if type(value) is kind or (kind is float and type(value) is int):
            return kind(value)
        raise ConfigError(f"{self.where}: {key} = {value!r}: expected {EXPECTED[kind]}")

    def size(self, key: str, default: int) -> int:
        """A whole number above 0."""
        value = self.get(key, default)
        require(value > 0, f"{self.where}: {key} = {value}: must be > 0")
        return value

    def count(self, key: str, default: int) -> int:
        """A whole number, 0 or more."""
        value = self.get(key, default)
        require(value >= 0, f"{self.where}: {key} = {value}: must be >= 0")
        return value

    def section(self, key: str) -> "ConfigFile":
        """A table inside; empty where there is none."""
        values = self.values.get(key)
        is_table = values is None or isinstance(values, Mapping)
        require(is_table, f"{self.where}: {key} = {values!r}: expected a table")
        return ConfigFile(values or {}, f"{self.where}: {key}")

    def of_kind(self, model_type: str) -> "ConfigFile":
        """The same file, of that model_type where it does not name its own."""
        said = self.values.get("model_type") is not None
        return self if said else replace(self, values={**self.values, "model_type": model_type})

    def refuse_all_but(self, key: str, known: Any) -> None:
        """Raises ConfigError unless `key` is missing, null or `known`."""
        value = self.values.get(key)
        require(
            value is None or value == known,
            f"{self.where}: {key} = {value!r}: not supported here, only {known!r}",
        )

    @property
    def model_type(self) -> str:
        """Its model_type; empty where it names none."""
        return self.get("model_type", "")


def read_config(folder: Path) -> ConfigFile:
    """config.json of a folder. Raises ConfigError where it is not there, cannot be read or is no object."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = f"a Hugging Face folder has a {CONFIG} next to its weights; {get_it(path)}"
        if any(folder.glob("mp_rank_*")) or any(folder.glob("iter_*/mp_rank_*")):
            hint = f"a folder of Megatron: torchtitan-vlm from_torch --torch {folder} --out OTHER makes one"
        raise ConfigError(f"{path}: {error.strerror}: {hint}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error}): fetch it again") from None
    require(isinstance(values, dict), f"{path}: expected an object, with model_type and sizes")
    file = ConfigFile(values, str(path))
    quantized = f"{path}: quantization_config: quantized weights cannot be trained; take the original ones"
    require(values.get("quantization_config") is None, quantized)
    return file
