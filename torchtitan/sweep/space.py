"""Which combinations of options a sweep runs: a grid, options that go together, and draws. Imports no torch.

Values are what the job's options take. Those of a command line are read once their option's type is known.
"""

import contextlib
import itertools
import math
import random
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from torchtitan.config.errors import ConfigError, require
from torchtitan.config.parse import closest
from torchtitan.config.table import convert

Assignment = dict[str, Any]  # option -> value
Axis = tuple[str, ...]  # options whose values go together, or one
SEED = "debug.seed"
DIGITS = 4  # of a number that is drawn, so that it can be read and typed
TRIES = 100  # draws for each that is asked for, where many are alike


@dataclass(frozen=True)
class Text:
    """Values of a command line, with commas between them; or as TOML writes them."""

    text: str


@dataclass(frozen=True)
class Range:
    """Numbers that are drawn, all alike (linear), or so that each factor between them is (log)."""

    min: float
    max: float
    scale: str = "linear"


@dataclass(frozen=True)
class Space:
    """What was asked to be swept; `combinations` reads it."""

    grid: Mapping[str, Any]  # option -> values: each with each
    zipped: list[dict[str, Any]]  # options -> as many values each, the n-th of each together
    random: Mapping[str, Any]  # option -> Range, or values of which one is drawn
    draws: int
    draw_seed: int
    seeds: int  # 0: as the job has it

    @property
    def axes(self) -> list[Axis]:
        """The axes, each crossed with the others but for draws; in the order of an assignment."""
        alone = [(key,) for key in (*self.random, *([SEED] if self.seeds else []))]
        return [*((key,) for key in self.grid), *map(tuple, self.zipped), *alone]


def combinations(space: Space, known: Mapping[str, Any], first_seed: int) -> list[Assignment]:
    """What each run sets, seeds last and fastest. `known`: option -> its type.

    Raises ConfigError for what is no option, no value of it, or there twice.
    """
    keys = [*space.grid, *itertools.chain(*space.zipped), *space.random, *([SEED] if space.seeds else [])]
    require(bool(keys), "nothing to sweep: give --sweep KEY=a,b or --seeds, or [sweep.grid] in the file")
    for key in keys:
        require(key in known, f"sweep: {key}: no such option{closest(key, known)}")
        mine = key == "job.description" or not key.startswith("job.")
        require(mine, f"sweep: {key}: each run has its own, which follows from --out")
        require(keys.count(key) == 1, f"sweep: {key} is swept in two places; keep one")
    axes = [[{key: value} for value in _values(key, given, known)] for key, given in space.grid.items()]
    axes += [_together(group, known) for group in space.zipped]
    axes += [_drawn(space, known)] if space.random or space.draws else []
    axes += [[{SEED: first_seed + n} for n in range(space.seeds)]] if space.seeds else []
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)]


def flat(table: Any, where: str, key: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": ...}} as {"optimizer.lr": ...}. A table with `min` in it is a Range."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}{'.' if key else ''}{key} = {table!r}: expected a table of options")
    found: dict[str, Any] = {}
    for name, value in table.items():
        option = f"{key}.{name}" if key else name
        if not isinstance(value, dict):
            found[option] = value
        elif "min" in value or "max" in value:
            found[option] = _range(option, value)
        else:
            found |= flat(value, where, option)
    return found


def range_of_text(key: str, text: str) -> Range | Text:
    """LEAST:MOST, LEAST:MOST:log, or values with commas between them."""
    least, *rest = text.split(":")
    if not rest:
        return Text(text)
    try:
        table: dict[str, Any] = {"min": float(least), "max": float(rest[0])}
    except ValueError:
        raise ConfigError(f"--random {key}={text}: expected LEAST:MOST or LEAST:MOST:log") from None
    return _range(key, table | ({"scale": ":".join(rest[1:])} if rest[1:] else {}))


def _range(key: str, table: dict[str, Any]) -> Range:
    where = f"sweep.random: {key}"
    unknown = sorted(set(table) - {"min", "max", "scale"})
    require(not unknown, f"{where}.{''.join(unknown[:1])}: a range has min, max and scale")
    for name in ("min", "max"):
        number = type(table.get(name)) in (int, float) and math.isfinite(table[name])
        require(number, f"{where}.{name} = {table.get(name)!r}: expected a number")
    drawn = Range(table["min"], table["max"], table.get("scale", "linear"))
    require(drawn.scale in ("linear", "log"), f"{where}.scale = {drawn.scale}: must be linear or log")
    require(drawn.min < drawn.max, f"{where}: min ({drawn.min}) must be below max ({drawn.max})")
    positive = drawn.scale == "linear" or drawn.min > 0
    require(positive, f"{where}: min = {drawn.min} must be > 0 for scale = log")
    return drawn


def _values(key: str, given: Any, known: Mapping[str, Any]) -> list[Any]:
    """The values of one option, in its type, each once."""
    return _each_once(key, _typed(key, given, known[key]))


def _together(group: Mapping[str, Any], known: Mapping[str, Any]) -> list[Assignment]:
    """Values of several options, the n-th of each at once."""
    columns = {key: _typed(key, given, known[key]) for key, given in group.items()}
    given = ", ".join(f"{len(values)} of {key}" for key, values in columns.items())
    same = len({len(values) for values in columns.values()}) == 1
    require(same, f"sweep.zip: expected as many values of each option, not {given or 'no option'}")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return _each_once(", ".join(columns), rows)


def _typed(key: str, given: Any, hint: Any) -> list[Any]:
    if isinstance(given, Text):
        found = _read(key, given.text, hint)
    else:
        require(isinstance(given, list), f"sweep: {key} = {given!r}: expected a list of values")
        found = [convert(value, hint, f"sweep: {key}") for value in given]
    require(bool(found), f"sweep: {key}: there are no values")
    return found


def _read(key: str, text: str, hint: Any) -> list[Any]:
    """Values as TOML reads them where that fits the option, else the texts between the commas."""
    try:
        return [convert(value, hint, key) for value in tomllib.loads(f"values = [{text}]")["values"]]
    except (tomllib.TOMLDecodeError, ConfigError):
        return [_read_one(f"sweep: {key}", part.strip(), hint) for part in text.split(",")]


def _read_one(key: str, text: str, hint: Any) -> Any:
    with contextlib.suppress(tomllib.TOMLDecodeError, ConfigError):
        return convert(tomllib.loads(f"value = {text}")["value"], hint, key)
    if float in (hint, *get_args(hint)):
        with contextlib.suppress(ValueError):  # TOML knows no .5
            return convert(float(text), hint, key)
    return convert(text, hint, key)


def _each_once(key: str, values: list[Any]) -> list[Any]:
    for number, value in enumerate(values):
        shown = ", ".join(map(str, value.values())) if isinstance(value, dict) else value
        require(value not in values[:number], f"sweep: {key} = {shown}: is there twice")
    return values


def _drawn(space: Space, known: Mapping[str, Any]) -> list[Assignment]:
    require(bool(space.random), f"sweep.draws = {space.draws}: nothing to draw from; see [sweep.random]")
    require(space.draws > 0, "sweep.random: how many are drawn? Give sweep.draws or --draws")
    choices = {
        key: given if isinstance(given, Range) else _values(key, given, known)
        for key, given in space.random.items()
    }
    found: list[Assignment] = []
    for draw in itertools.islice(_draws(choices, known, space.draw_seed), TRIES * space.draws):
        if draw not in found:
            found.append(draw)
        if len(found) == space.draws:
            return found
    raise ConfigError(
        f"sweep.draws = {space.draws}: the ranges gave {len(found)} different combinations; ask for fewer"
    )


def _draws(choices: Mapping[str, Any], known: Mapping[str, Any], seed: int) -> Iterator[Assignment]:
    """Endless draws. What is drawn for an option depends on seed, option and number alone."""
    for number in itertools.count():
        yield {
            key: _draw(key, choice, known[key], random.Random(f"{seed} {key} {number}"))
            for key, choice in choices.items()
        }


def _draw(key: str, choice: Any, hint: Any, source: random.Random) -> Any:
    if not isinstance(choice, Range):
        return source.choice(choice)
    arms = (hint, *(get_args(hint) if get_origin(hint) is not list else ()))
    require(int in arms or float in arms, f"sweep.random: {key}: takes no number; list its values")
    if int in arms:
        least, most = math.ceil(choice.min), math.floor(choice.max)
        none = f"sweep.random: {key}: there is no whole number between {choice.min} and {choice.max}"
        require(least <= most, none)
        if choice.scale == "linear":
            return source.randint(least, most)
        return min(max(round(_log_uniform(choice, source)), least), most)
    value = _log_uniform(choice, source) if choice.scale == "log" else source.uniform(choice.min, choice.max)
    return min(max(float(f"{value:.{DIGITS}g}"), choice.min), choice.max)


def _log_uniform(choice: Range, source: random.Random) -> float:
    return math.exp(source.uniform(math.log(choice.min), math.log(choice.max)))
