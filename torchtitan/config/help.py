"""What `--help` shows of a job: all sections, or with `--help SECTION` that one. Imports no torch."""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from torchtitan.config.errors import ConfigError, did_you_mean
from torchtitan.config.job import JobConfig

FLAGS = ("-h", "--help")
TRAINER = "torchtitan-vlm train"


@dataclasses.dataclass(frozen=True)
class Guide:
    """What help says besides the options and their comments."""

    usage: str = TRAINER  # how the command is called
    about: str = ""  # what it does, and what it reads besides options
    # section -> a line on what its options choose from, where that is not in their types
    choices: Callable[[], Mapping[str, str]] = dict


PLAIN = Guide()


@dataclasses.dataclass(frozen=True)
class Page:
    """What tyro needs to print help: `sections`, a dataclass with one field for each that is shown."""

    sections: type
    default: Any
    text: str


def help_page(groups: Sequence[Sequence[str]], job: JobConfig, file: str, guide: Guide) -> Page | None:
    """The page that the command line asks for; None where it asks for none. `job`: as `file` describes it.

    Raises ConfigError for a section that there is not.
    """
    asking = [group for group in groups if group[0] in FLAGS]
    if not asking:
        return None
    known = [field.name for field in dataclasses.fields(job)]
    names = list(dict.fromkeys(name.partition(".")[0] for group in asking for name in group[1:]))
    for name in names:
        if name not in known:
            raise ConfigError(f"--help {name}: no such section{did_you_mean(name, known)}")
    full = _with_examples(job)
    shown = {name: getattr(full, name) for name in names or known}
    choices = dict.fromkeys(line for section, line in guide.choices().items() if section in shown)
    head = [] if names else [guide.about.strip()]
    more = [] if names else [f"One section alone: --help SECTION, of {', '.join(known)}."]
    more += [f"Defaults are those of {file}."] if file else []
    sections = dataclasses.make_dataclass("Sections", [(name, type(value)) for name, value in shown.items()])
    text = "\n\n".join([*head, *map(_paragraph, (*choices, *more))])
    return Page(sections, sections(**shown), text)


def _paragraph(line: str) -> str:
    # tyro keeps the ends of lines that are indented, and joins the others
    indent = "    "
    return textwrap.fill(line, 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _with_examples(job: JobConfig) -> JobConfig:
    """The job with one item in each empty list of tables, so that the options of an item are shown."""
    for section in vars(job).values():
        for name, hint in get_type_hints(type(section)).items():
            if (
                get_origin(hint) is list
                and dataclasses.is_dataclass(item := get_args(hint)[0])
                and not getattr(section, name)
            ):
                setattr(section, name, [item()])  # type: ignore[operator]
    return job
