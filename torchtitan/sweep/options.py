"""What a sweep is asked for: the table [sweep] of a job file, and the same on the command line, which wins.

    [sweep]
    out = "sweeps/a"
    seeds = 2

    [sweep.grid]                       --sweep optimizer.name=AdamW,Muon
    optimizer.name = ["AdamW", "Muon"]

    [[sweep.zip]]                      --zip 'training.seq_len=512,1024 data.patches_per_row=976,1952'
    training.seq_len = [512, 1024]
    data.patches_per_row = [976, 1952]

    [sweep.random]                     --random optimizer.lr=1e-4:1e-2:log --draws 8
    optimizer.lr = {min = 1e-4, max = 1e-2, scale = "log"}

Imports no torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import tyro

from torchtitan.config.check import check_options
from torchtitan.config.errors import ConfigError, did_you_mean, require
from torchtitan.config.parse import SWEEP
from torchtitan.config.table import from_table
from torchtitan.sweep.space import Space, Text, flat, range_of_text

BETWEEN_KEYS = re.compile(r"\s+(?=[\w.]+=)")  # values may have spaces
TABLES = ("grid", "zip", "random")
LIMITS = {"seeds": ">= 0", "draws": ">= 0", "at_once": ">= 0", "index": "-1 or >= 0"}


@dataclass
class Settings:
    """Options of [sweep] and of the command line alike."""

    out: str = ""  # folder of the sweep, with one for each run in it; empty: job.dump_folder
    # runs of each combination, with debug.seed and the numbers after it; 0: one, and no seed in the names
    seeds: int = 0
    draws: int = 0  # combinations that are drawn from the ranges of [sweep.random]
    draw_seed: int = 0  # of the draws; with more draws the first stay the same
    # runs at one time on this machine, which share its GPUs, or else its cores; 0: one for each NGPU
    # GPUs (NGPU unset: for each GPU), or one where there is none
    at_once: int = 0
    # figure of metrics.jsonl whose last value says which run is best; empty: validate/loss, or else loss
    metric: str = ""
    # of sbatch, without the dashes: gpus-per-node=8 time=12:00:00
    slurm_options: list[str] = field(default_factory=list)


@dataclass
class Options(Settings):
    """Many runs of one job, each with other options."""

    # KEY=a,b,c: an option and its values; may be given several times, for every combination
    sweep: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    # 'KEY=a,b OTHER=c,d': options whose values go together, the first of each with the first of the others
    zip: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    # KEY=LEAST:MOST or KEY=LEAST:MOST:log, or KEY=a,b,c: what is drawn for an option, --draws times
    random: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    dry_run: bool = False  # check all, list the runs with what they cost, and start none
    report: bool = False  # table and picture of what there is; start none
    slurm: bool = False  # write a script for sbatch that runs them as an array; start none
    index: int = -1  # start this one alone, counted from 0 as --dry_run lists them


def settings_of(table: Mapping[str, Any]) -> Settings:
    """The options of a table [sweep], but for the values themselves. Raises ConfigError."""
    require(isinstance(table, dict), f"{SWEEP} = {table!r}: expected a table")
    known = [*TABLES, *(field.name for field in fields(Settings))]
    for name in table:
        values = "values of options stand in [sweep.grid], [[sweep.zip]] and [sweep.random]"
        require(name in known, f"{SWEEP}.{name} is not a known option{did_you_mean(name, known)}; {values}")
    return from_table(Settings, {k: v for k, v in table.items() if k not in TABLES}, SWEEP)


def with_settings(settings: Settings) -> Options:
    """Options where those of the file are the defaults."""
    return Options(**vars(settings))


def space_of(table: Mapping[str, Any], options: Options) -> Space:
    """What a table [sweep] and the command line, which wins, sweep. Raises ConfigError."""
    check_options(options, LIMITS)
    starts_none = [name for name in ("dry_run", "report", "slurm") if getattr(options, name)]
    starts_none += ["index"] * (options.index >= 0)
    require(len(starts_none) < 2, f"{' and '.join(f'--{name}' for name in starts_none)}: give one of them")
    zips = table.get("zip", [])
    zips = [zips] if isinstance(zips, dict) else zips
    grid = flat(table.get("grid", {}), "sweep.grid") | dict(_pairs(options.sweep, "sweep"))
    asked = [dict(_pairs(BETWEEN_KEYS.split(text.strip()), "zip")) for text in options.zip]
    named = {key for one in asked for key in one}  # the command line wins
    zipped = [one for one in (flat(one, "sweep.zip") for one in zips) if not named & one.keys()] + asked
    random = flat(table.get("random", {}), "sweep.random") | {
        key: range_of_text(key, text) for key, text in _pairs(options.random, "random", read=False)
    }
    return Space(grid, zipped, random, options.draws, options.draw_seed, options.seeds)


def _pairs(given: Sequence[str], option: str, read: bool = True) -> list[tuple[str, Any]]:
    """KEY=VALUES, each key once."""
    found: dict[str, Any] = {}
    for text in given:
        key, equals, values = text.partition("=")
        if not (key and equals and values):
            raise ConfigError(f"--{option} {text}: expected KEY=VALUES, such as optimizer.lr=1e-4,1e-3")
        require(key not in found, f"--{option} {key}: is given twice; name all of its values at once")
        found[key] = Text(values) if read else values
    return list(found.items())
