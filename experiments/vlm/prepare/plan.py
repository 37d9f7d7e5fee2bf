"""The input, cut into pieces that each become one shard. Made once, and kept in the output folder.

A plan depends on the input alone: not on how many processes or machines work on it, nor on how often they were killed.
"""

import dataclasses
import glob
import gzip
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.vlm.prepare.folder import Folder, appearing, read_json, write_json
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.records import KINDS, Sources, kind_of
from experiments.vlm.prepare.rows import Piece, read_rows
from torchtitan.config.errors import ConfigError

SUFFIXES = (".parquet", ".tsv", ".jsonl", ".json", ".tsv.gz", ".jsonl.gz", ".json.gz")
UNNAMED_COLUMNS = {0: ["url", "caption"], 1: ["caption", "url"]}  # of a TSV, by where its first address stands


@dataclass(frozen=True)
class Plan:
    kind: str
    pieces: list[Piece]
    options: dict
    inputs: dict[str, int]  # file -> bytes

    @property
    def records(self) -> int:
        return sum(piece.rows for piece in self.pieces)


def make_plan(options: Options, folder: Folder) -> Plan:
    """The plan of the folder, or a new one. Raises ConfigError where the folder's is of another input or other options."""
    inputs = {file: Path(file).stat().st_size for file in list_inputs(options.input)}
    if folder.plan.exists():
        plan = load_plan(folder)
        check_same(plan, options, inputs, folder)
        return plan
    files = [plain(Path(file), number, folder) for number, file in enumerate(inputs)]
    pieces = [piece for file in files for piece in cut(file, options.records_per_shard)]
    if not pieces:
        raise ConfigError(f"--input {options.input} holds no record")
    plan = Plan(find_kind(options, pieces), pieces, options.outcome(), inputs)
    write_json(folder.plan, dataclasses.asdict(plan))
    return plan


def load_plan(folder: Folder) -> Plan:
    value = read_json(folder.plan)
    return Plan(**{**value, "pieces": [Piece(**piece) for piece in value["pieces"]]})


def check_same(plan: Plan, options: Options, inputs: dict[str, int], folder: Folder) -> None:
    for name, value in options.outcome().items():
        if plan.options.get(name) != value:
            begun = f"{folder.out} was begun with --{name} {plan.options.get(name)}, not {value}"
            raise ConfigError(f"{begun}: take another --out, or the same options")
    if plan.inputs != inputs:
        raise ConfigError(f"{folder.out} was begun with other files of {options.input}: take another --out")


def list_inputs(pattern: str) -> list[str]:
    path = Path(pattern)
    found = [str(file) for file in path.iterdir()] if path.is_dir() else glob.glob(pattern, recursive=True)
    files = sorted(str(Path(file).resolve()) for file in found if file.endswith(SUFFIXES))
    if not files:
        raise ConfigError(f"--input {pattern}: no file of {', '.join(SUFFIXES)} there")
    return files


def plain(file: Path, number: int, folder: Folder) -> Path:
    """The same records where a piece can be read without the rest: gzip is undone, an array is written as lines."""
    if file.name.endswith(SUFFIXES[:3]):
        return file
    name = file.name.removesuffix(".gz")
    copy = folder.inputs / f"{number:03d}-{name}{'l' * name.endswith('.json')}"
    with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as source, appearing(copy) as target:
        if name.endswith(".json"):
            target.writelines(json_lines(source.read(), file))
        else:
            shutil.copyfileobj(source, target)
    return copy


def json_lines(data: bytes, file: Path) -> list[bytes]:
    """A JSON array as lines; lines that are called .json stay as they are."""
    try:
        value = json.loads(data)
    except ValueError:
        return data.splitlines(keepends=True)
    if not isinstance(value, list):
        raise ConfigError(f"--input {file}: must be a JSON array of records, or a record on each line")
    return [json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for record in value]


def cut(file: Path, rows: int) -> list[Piece]:
    if file.suffix == ".parquet":
        try:
            total = pq.read_metadata(file).num_rows
        except pa.ArrowException as error:
            raise ConfigError(f"--input {file} is not a parquet file: {error}") from error
        return [Piece(str(file), None, first, min(rows, total - first)) for first in range(0, total, rows)]
    return cut_lines(file, rows)


def cut_lines(file: Path, rows: int) -> list[Piece]:
    pieces: list[Piece] = []
    starts, count = [], 0
    with file.open("rb") as lines:
        columns, offset = read_header(lines.readline()) if file.suffix == ".tsv" else (None, 0)
        lines.seek(offset)
        for line in lines:
            if line.strip():
                if count % rows == 0:
                    starts.append(offset)
                count += 1
            offset += len(line)
    for number, start in enumerate(starts):
        pieces.append(Piece(str(file), columns, number * rows, min(rows, count - number * rows), start))
    return pieces


def read_header(line: bytes) -> tuple[list[str], int]:
    """The columns of a TSV and where its records begin. A first line with an address in it is a record already."""
    values = line.decode("utf-8", "replace").rstrip("\r\n").split("\t")
    address = next((i for i, value in enumerate(values) if value.lower().startswith(("http://", "https://"))), None)
    if address is None:
        return values, len(line)
    return UNNAMED_COLUMNS[address] if len(values) == 2 else [str(i) for i in range(len(values))], 0


def find_kind(options: Options, pieces: list[Piece]) -> str:
    """Told by the first record that can be read, where it was not said."""
    if options.kind != "auto":
        return options.kind
    if options.image_column and options.text_column:
        return "captions"
    row = next((row for piece in pieces for row in read_rows(piece) if isinstance(row, dict)), None)
    kind = kind_of(row) if row else None
    if kind is None:
        columns = ", ".join(row or ["(none)"])
        raise ConfigError(f"--kind auto: columns {columns} fit none of {', '.join(KINDS)}: say --kind, --image_column, --text_column")
    return kind


def sources_of(options: Options) -> Sources:
    return Sources(options.image_column, options.text_column, options.image_folder)
