"""A job's options from the command line, a TOML file and the defaults, in this precedence. Imports no torch.

The dataclasses (torchtitan/config/job.py) are the only list of options: tyro makes `--section.field value`,
`--section.flag`, `--section.no_flag` and `--help` of them, and table.py reads the same dataclasses from TOML.
Whatever is wrong with either becomes one ConfigError of one line.
"""

import contextlib
import dataclasses
import io
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from torchtitan.config.errors import ConfigError, did_you_mean
from torchtitan.config.help import FLAGS, PLAIN, TRAINER, Guide, help_page
from torchtitan.config.job import JobConfig, Model
from torchtitan.config.shipped import shipped_job, shipped_jobs
from torchtitan.config.table import expected, from_table, to_table

Options = TypeVar("Options")
# Where the options of this run come from is no option of a file: a file that names another would be a chain.
COMMAND_LINE_ONLY = "job.config_file"
SWEEP = "sweep"  # the table of a file that asks for many runs: torchtitan/sweep
SINGLE_SOURCE = ("training.dataset", "training.dataset_path")


def parse(
    argv: Sequence[str], config_classes: Mapping[str, type[JobConfig]], guide: Guide = PLAIN
) -> JobConfig:
    """The job that `argv` describes, as the class of its `model.name`. `--help [SECTION]` prints and exits.

    Raises ConfigError for an unknown option, a value of the wrong type, or a TOML file that cannot be read.
    """
    table = table_of(argv)
    if SWEEP in table:
        many = "makes many jobs of this file: `torchtitan-vlm sweep` and run_train.sh start them"
        raise ConfigError(f"{config_file(argv)}: [{SWEEP}] {many}")
    return parse_over(table, argv, config_classes, guide)


def table_of(argv: Sequence[str]) -> dict[str, Any]:
    """The tables of the file that the options name, if any. Raises ConfigError where it cannot be read."""
    file = config_file(argv)
    return read_toml(file) if file else {}


def config_file(argv: Sequence[str]) -> str | None:
    """The job file that the options name, the last one of several."""
    return last_value(split_options(argv), COMMAND_LINE_ONLY)


def parse_over(
    table: Mapping[str, Any],
    argv: Sequence[str],
    config_classes: Mapping[str, type[JobConfig]],
    guide: Guide = PLAIN,
) -> JobConfig:
    """As `parse`, with the tables of the file in hand."""
    groups, file = split_options(argv), config_file(argv)
    name = last_value(groups, "model.name") or _named_in(table) or Model.name
    if name not in config_classes:
        raise ConfigError(f"model.name = {name!r} is not an experiment{did_you_mean(name, config_classes)}")
    try:
        job = from_table(config_classes[name], table)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    known = option_types(type(job), job)
    for group in groups:
        check_spelling(group, known)
    if page := help_page(groups, job, file or "", guide):
        run_tyro(page.sections, FLAGS[:1], page.default, guide.usage, page.text)
    job = run_tyro(type(job), argv, job, guide.usage)
    given = given_options(groups, known)
    if not given.isdisjoint(SINGLE_SOURCE):
        job.use_single_source(given)
    return job


def parse_script(
    argv: Sequence[str],
    options_class: type[Options],
    config_classes: Mapping[str, type[JobConfig]],
    description: str = "",
) -> tuple[Options, JobConfig]:
    """A script's own options (a dataclass), and the trainer's: what is not the script's is the job's.

    Values before the first option are the script's (tyro.conf.Positional). `--help` prints the script's
    options and exits.
    """
    own, rest = split_script(argv, options_class)
    return run_script(options_class, own, description), parse(rest, config_classes)


def split_script(argv: Sequence[str], options_class: type) -> tuple[list[str], list[str]]:
    """A script's own part of a command line, and the trainer's."""
    own_names = _spellings(option_types(options_class))
    own: list[str] = []
    rest: list[str] = []
    for group in split_options(argv):
        asks = group == ["--help"]  # with a section behind it, it is about the job
        is_own = not group[0].startswith("--") or asks or _name(group) in own_names
        (own if is_own else rest).extend(group)
    return own, rest


def run_script(
    cls: type[Options],
    own: Sequence[str],
    description: str,
    default: Options | None = None,
    prog: str | None = None,
) -> Options:
    """A script's own options, of its own part of the command line, over those of `default`."""
    description = f"{description}\n\nTakes the trainer's options too: see {TRAINER} --help.".strip()
    return run_tyro(cls, own, default, prog, description)


def read_toml(file: str) -> dict[str, Any]:
    """The tables of a file. Raises ConfigError where it is not there or not TOML."""
    try:
        table = tomllib.loads(shipped_job(file).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        wrong = f"{COMMAND_LINE_ONLY} = {file}: byte {error.start} is not UTF-8"
        raise ConfigError(f"{wrong}: save the file as UTF-8") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        known = (
            f"; jobs of the package: {', '.join(shipped_jobs())}"
            if isinstance(error, FileNotFoundError)
            else ""
        )
        reason = (
            f"{error.strerror} (looked from {Path.cwd()}){known}"
            if isinstance(error, OSError)
            else str(error)
        )
        raise ConfigError(f"{COMMAND_LINE_ONLY} = {file}: {reason}") from None
    section, field = COMMAND_LINE_ONLY.split(".")
    if field in _section(table, section):
        raise ConfigError(f"{file}: {COMMAND_LINE_ONLY} belongs on the command line, not into a file")
    return table


def to_toml(job: JobConfig) -> str:
    """The whole resolved job as TOML that parses back to the same job. `job.config_file` is a comment."""
    tables = [
        to_table(getattr(job, f.name), f.name, leave_out=(COMMAND_LINE_ONLY,))
        for f in dataclasses.fields(job)
    ]
    return f"# from {job.job.config_file or 'the defaults'} and the command line\n\n" + "\n".join(tables)


def run_tyro(
    cls: type[Options],
    argv: Sequence[str],
    default: Options | None,
    prog: str | None,
    description: str | None = None,
) -> Options:
    """tyro's command line for a dataclass; errors are one ConfigError, not its box and exit code."""
    printed = io.StringIO()
    defaults = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                cls, args=list(argv), use_underscores=True, prog=prog, description=description, **defaults
            )  # type: ignore[call-overload]
    except SystemExit as exit_:
        if not exit_.code:  # --help
            raise
        raise ConfigError(
            _complaint(printed.getvalue(), split_options(argv), option_types(cls, default))
        ) from None


def option_types(cls: type, default: Any = None, key: str = "") -> dict[str, Any]:
    """Option name -> type, for each leaf of a dataclass.

    A list of tables has one option for each field of each item.
    """
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        value = getattr(default, name, None)
        item = get_args(hint)[0] if get_origin(hint) is list else None
        if dataclasses.is_dataclass(hint):
            found |= option_types(hint, value, f"{key}{name}.")  # type: ignore[arg-type]
        elif dataclasses.is_dataclass(item):
            for number, record in enumerate(value or []):
                found |= option_types(item, record, f"{key}{name}.{number}.")  # type: ignore[arg-type]
        else:
            found[key + name] = hint
    return found


def split_options(argv: Sequence[str]) -> list[list[str]]:
    """Each option with its values; `--a=b` is split.

    Values before the first option are a group of their own.
    """
    groups: list[list[str]] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            groups.append([name, value] if equals else [name])
        elif groups:
            groups[-1].append(token)
        else:
            groups.append([token])
    return groups


def given_options(groups: Iterable[Sequence[str]], known: Mapping[str, Any]) -> set[str]:
    """Which of the known options stand among what `split_options` gives, however they are spelled."""
    spellings = _spellings(known)
    return {spellings[name] for group in groups if (name := _name(group)) in spellings}


def last_value(groups: Iterable[Sequence[str]], option: str) -> str | None:
    """The value of the last `--option value` among what `split_options` gives, or None."""
    return next(
        (group[-1] for group in reversed(list(groups)) if _name(group) == option and len(group) > 1), None
    )


def check_spelling(group: Sequence[str], known: Mapping[str, Any]) -> None:
    """An option that exists, with as many values as it takes. (What the values are is tyro's to judge.)"""
    if group[0] in FLAGS:
        return
    name, values = _name(group), group[1:]
    option = _spellings(known).get(name)
    if option is None:
        raise ConfigError(f"{' '.join(group)}: no such option{closest(name, known)}")
    if known[option] is bool and values:
        on, off = (f"--{spelling}" for spelling, meant in _spellings(known).items() if meant == option)
        raise ConfigError(
            f"{option} = {' '.join(values)}: takes no value; {on} turns it on, {off} turns it off"
        )
    if len(values) != 1 and known[option] in (int, float, str):
        raise ConfigError(
            f"{option}: expected {expected(known[option])}, got {len(values)} values: {' '.join(values)}"
        )


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the field in another section (training.lr: optimizer.lr), or what is
    spelt most like it.
    """
    options = list(known)
    same_field = [option for option in options if option.rpartition(".")[2] == name.rpartition(".")[2]]
    close = get_close_matches(name, same_field, n=1, cutoff=0.0) or get_close_matches(name, options, n=1)
    return f"; did you mean --{close[0]}?" if close else "; --help lists all"


def _complaint(text: str, groups: Iterable[Sequence[str]], known: Mapping[str, Any]) -> str:
    """What tyro printed, as one line: in our words where it names an option that was given; tyro judges the
    last value of one that was repeated.
    """
    named = {name.replace("-", "_") for name in re.findall(r"--([\w.-]+)", text)}
    for group in reversed(list(groups)):
        if (name := _name(group)) in named and name in known:
            given = f"{name} = {' '.join(group[1:])}" if group[1:] else f"{name}, without a value"
            return f"{given}: expected {expected(known[name])}"
    rows = [re.sub(r"[-─]{4,}|[│╭╮╰╯]", " ", line).strip() for line in text.splitlines()]
    title, _, said = "\n".join(rows).strip().partition("\n")  # where a rule was is an empty row
    return "; ".join(" ".join(part.split()) for part in (said.strip() or title).split("\n\n"))


def _spellings(known: Mapping[str, Any]) -> dict[str, str]:
    """What may follow `--` -> the option that is meant: a flag can be switched off too."""
    off = {}
    for option, hint in known.items():
        section, dot, field = option.rpartition(".")
        if hint is bool:
            off[f"{section}{dot}no_{field}"] = option
    return {option: option for option in known} | off


def _name(group: Sequence[str]) -> str:
    return group[0].removeprefix("--").replace("-", "_")


def _section(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = table.get(name, {})
    return section if isinstance(section, dict) else {}


def _named_in(table: Mapping[str, Any]) -> str | None:
    """model.name of a TOML file, where it is a text (if it is not, the type check says so)."""
    name = _section(table, Model.__name__.lower()).get("name")
    return name if isinstance(name, str) else None
