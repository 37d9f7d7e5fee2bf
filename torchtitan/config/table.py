"""TOML tables to option dataclasses and back, with a type check of every value. Imports no torch."""

import dataclasses
import json
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torchtitan.config.errors import ConfigError, did_you_mean

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def expected(hint: Any) -> str:
    """The values that a type allows, in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (list, tuple):
        return f"a list, each item {expected(get_args(hint)[0])}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("nothing" if arm is type(None) else expected(arm) for arm in get_args(hint))
    return (
        "a table"
        if dataclasses.is_dataclass(hint)
        else EXPECTED.get(hint, getattr(hint, "__name__", str(hint)))
    )


def from_table(cls: type, table: Any, key: str = "") -> Any:
    """A `cls` (a dataclass) from a TOML table, with defaults where it says nothing. `key`: where it stands.

    Raises ConfigError for an unknown key or a value of the wrong type.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{key} = {table!r}: expected a table")
    hints = get_type_hints(cls)
    for name in table:
        if name not in hints:
            raise ConfigError(
                f"{_join(key, name)} is not a known "
                f"option{did_you_mean(_join(key, name), (_join(key, known) for known in hints))}"
            )
    return cls(**{name: convert(value, hints[name], _join(key, name)) for name, value in table.items()})


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as TOML gave it, as the type `hint`.

    A whole number will do for a float; true and false are no numbers.
    """
    if dataclasses.is_dataclass(hint):
        return from_table(hint, value, key)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (list, tuple) and isinstance(value, list):
        return origin(convert(item, args[0], f"{key}[{number}]") for number, item in enumerate(value))
    if origin is Literal and value in args and type(value) in map(type, args):
        return value
    # Optional: TOML has no null, so a value is meant for the other arm
    if origin in (Union, types.UnionType):
        return convert(value, next(arm for arm in args if arm is not type(None)), key)
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is hint:
        return value
    raise ConfigError(f"{key} = {value!r}: expected {expected(hint)}")


def to_table(record: Any, key: str, leave_out: tuple[str, ...] = ()) -> str:
    """The TOML text of a dataclass under the heading [key].

    An option that is None is not written: that is its default.
    """
    lines, tables = [f"[{key}]"], []
    for field in dataclasses.fields(record):
        name, value = field.name, getattr(record, field.name)
        if value is None or _join(key, name) in leave_out:
            continue
        if isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            tables += [to_table(item, f"[{_join(key, name)}]") for item in value]
        else:
            lines.append(f"{name} = {literal(value)}")
    return "\n".join(lines) + "\n" + "".join("\n" + table for table in tables)


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # TOML's basic strings; DEL is no JSON escape
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if dataclasses.is_dataclass(value):
        fields = (f"{name} = {literal(inner)}" for name, inner in vars(value).items() if inner is not None)
        return "{" + ", ".join(fields) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return repr(value)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
