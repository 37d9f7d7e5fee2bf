"""A run's input, cut into pieces that each become one shard, and the walk through a piece's records.

A plan depends on the input alone: not on how many processes or machines work on it, nor on how often they
were killed. It is made once and kept in the output folder. Every stage walks the same way, so the n-th image
of a shard is the same in all.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from experiments.vlm.config import Data
from experiments.vlm.data.document import Draft
from experiments.vlm.data.formats import RECORD_FILES, RECORD_FORMATS, Record, captions, format_of
from experiments.vlm.data.formats.record_files import Records, open_records
from experiments.vlm.data.formats.record_shard import ImageFolder, folder_of
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.shard_cache import guarded
from experiments.vlm.data.sources.shards import hold_copy, match_files, suffix_of
from experiments.vlm.data.storage.file_cache import FileCache
from experiments.vlm.data.storage.outages import Retry
from experiments.vlm.prepare.folder import Folder, read_json, write_json
from experiments.vlm.prepare.options import Options
from torchtitan.config.errors import ConfigError

retry = Retry(Data.storage_timeout_s)  # of this process, with inputs that are away
SUFFIXES = (*RECORD_FILES, ".txt")
COPIES_BYTES = 50 << 30  # of unpacked inputs and row groups; the longest unused are made again
# formats whose images may stand in many records, so that none is left out for being repeated
SHARED = ("llava", "messages", "finevision")


@dataclass(frozen=True)
class InputSpan:
    """Records first ... first + count - 1 of an input file."""

    file: str
    first: int
    count: int


@dataclass(frozen=True)
class Plan:
    """The input cut into shards, and the options that made it."""

    format: str
    pieces: list[InputSpan]
    options: dict
    inputs: dict[str, int]  # file -> bytes

    @property
    def records(self) -> int:
        """Records of the whole input."""
        return sum(piece.count for piece in self.pieces)


@dataclass(frozen=True)
class Parsed:
    """A record that its format could read."""

    record: Record
    draft: Draft


@dataclass(frozen=True)
class PrepareJob:
    """One run: its options, folder and plan."""

    options: Options
    folder: Folder
    plan: Plan

    @classmethod
    def begin(cls, options: Options) -> "PrepareJob":
        """A run with its plan, made or found. Raises ConfigError."""
        folder = Folder(Path(options.out))
        return cls(options, folder, make_plan(options, folder))

    @classmethod
    def join(cls, options: Options) -> "PrepareJob":
        """The same run, for another process of it."""
        folder = Folder(Path(options.out))
        return cls(options, folder, load_plan(folder))

    @property
    def shards(self) -> int:
        """How many shards the input is cut into."""
        return len(self.plan.pieces)

    @property
    def dedup(self) -> bool:
        """Whether images that are there twice are used once."""
        return self.plan.format not in SHARED if self.options.dedup == "auto" else self.options.dedup == "on"

    def image_folder(self, number: int) -> ImageFolder:
        """Where the paths of a shard's images begin."""
        return ImageFolder(self.options.image_folder or folder_of(self.plan.pieces[number].file))

    def records(self, number: int) -> Iterator[tuple[str, Parsed | Rejected]]:
        """(key, record) of one shard, in the order of the input."""
        piece, parse = self.plan.pieces[number], parser(self.plan.format, self.options)
        settle = self.image_folder(number).settle
        records = open_input(piece.file, self.folder.inputs)
        for index in range(piece.count):
            yield (
                f"{number:05d}-{index:05d}",
                _parsed(records, piece.first + index, lambda record: settle(parse(record))),
            )

    def tail(self, number: int) -> Rejected | None:
        """Why the file of this piece ends early, where it is the last one of the file."""
        piece = self.plan.pieces[number]
        records = open_input(piece.file, self.folder.inputs)
        return records.tail if piece.first + piece.count == len(records) else None


def _parsed(records: Records, index: int, parse: Callable[[Record], Draft]) -> Parsed | Rejected:
    try:
        record = retry.call(f"record {index}", lambda: guarded(records.get, index))
        return Parsed(record, guarded(parse, record))
    except Rejected as rejected:
        return rejected


def parser(format: str, options: Options) -> Callable[[Record], Draft]:
    """The parse of a format; of captions with the columns that the options name."""
    if format == "captions":
        return functools.partial(
            captions.parse, image=options.image_column, text=options.text_column, several=False
        )
    return RECORD_FORMATS[format].parse


@functools.lru_cache(maxsize=8)
def open_input(file: str, copies: Path) -> Records:
    """Open an input, which stays open in this process, for all its threads. Raises ConfigError."""
    cache = FileCache(copies, COPIES_BYTES)
    try:
        return retry.call(file, functools.partial(_open_records, file, cache))
    except (OSError, EOFError, pa.ArrowException, Rejected) as error:
        raise ConfigError(f"--input {file} cannot be read: {error}") from error


def _open_records(file: str, cache: FileCache) -> Records:
    copy = hold_copy(file, cache)
    return open_records(str(copy.path) if copy else file, None, cache)


def make_plan(options: Options, folder: Folder) -> Plan:
    """The folder's plan, or a new one. Raises ConfigError where it is of another input or other options."""
    inputs = {file: Path(file).stat().st_size for file in list_inputs(options.input)}
    if folder.plan.exists():
        plan = load_plan(folder)
        check_same(plan, options, inputs, folder)
        return plan
    counts = {file: len(open_input(file, folder.inputs)) for file in inputs}
    pieces = [
        piece for file, count in counts.items() for piece in cut(file, count, options.records_per_shard)
    ]
    if not pieces:
        raise ConfigError(f"--input {options.input} holds no record")
    plan = Plan(find_format(options, pieces, folder), pieces, options.outcome(), inputs)
    write_json(folder.plan, dataclasses.asdict(plan))
    open_input.cache_clear()  # the process that only shows the progress needs no row group
    return plan


def cut(file: str, count: int, size: int) -> list[InputSpan]:
    """Pieces of a file of `count` records, `size` each and the last one less."""
    return [InputSpan(file, first, min(size, count - first)) for first in range(0, count, size)]


def load_plan(folder: Folder) -> Plan:
    """The plan that is kept in the folder. Raises OSError where there is none."""
    value = read_json(folder.plan)
    return Plan(**{**value, "pieces": [InputSpan(**piece) for piece in value["pieces"]]})


def check_same(plan: Plan, options: Options, inputs: dict[str, int], folder: Folder) -> None:
    """Raises ConfigError where the plan is of other options or another input."""
    for name, value in options.outcome().items():
        if plan.options.get(name) != value:
            begun = f"{folder.out} was begun with --{name} {plan.options.get(name)}, not {value}"
            raise ConfigError(f"{begun}: take another --out, or the same options")
    if plan.inputs != inputs:
        raise ConfigError(f"{folder.out} was begun with other files of {options.input}: take another --out")


def list_inputs(pattern: str) -> list[str]:
    """The files of a path, glob, brace range or folder, absolute and sorted. Raises ConfigError for none."""
    found = [Path(file).resolve() for file in match_files(pattern, SUFFIXES) if suffix_of(file) in SUFFIXES]
    files = sorted({str(file) for file in found if file.is_file()})
    if not files:
        raise ConfigError(f"--input {pattern}: no file of {', '.join(SUFFIXES)} there, packed or not")
    return files


def find_format(options: Options, pieces: list[InputSpan], folder: Folder) -> str:
    """The format asked for, else that of the first record that can be read."""
    record = next(_readable(pieces, folder), {})
    columns = ", ".join(record or ["(none)"])
    for option in ("image_column", "text_column"):
        name = getattr(options, option)
        if name and name not in record:
            raise ConfigError(f"--{option} {name} is not among the columns {columns}")
    if options.format != "auto":
        return options.format
    format = "captions" if options.image_column and options.text_column else format_of(record)
    if format is None:
        fit = f"columns {columns} fit none of {', '.join(RECORD_FORMATS)}"
        raise ConfigError(f"--format auto: {fit}: say --format, --image_column, --text_column")
    return format


def _readable(pieces: list[InputSpan], folder: Folder) -> Iterator[Record]:
    for piece in pieces:
        for index in range(piece.first, piece.first + piece.count):
            try:
                records = open_input(piece.file, folder.inputs)
                yield retry.call(piece.file, functools.partial(guarded, records.get, index))
            except Rejected:
                continue
