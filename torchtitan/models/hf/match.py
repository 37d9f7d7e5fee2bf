"""What of a folder goes where in a model, and what does not: compared before anything is read."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from torchtitan.config.errors import ConfigError, require
from torchtitan.models.hf.folder import read_tensors
from torchtitan.models.hf.safetensors_file import StoredTensor
from torchtitan.models.hf.tensors import FLOATS, Assembly, Mean, Rows, chunks, read_rows, shape_of
from torchtitan.models.weight_names import Piece, Row, to_ours, to_theirs

Shapes = Mapping[str, tuple[int, ...]]
ALLOW = "checkpoint.initial_load_allow"


@dataclass(frozen=True)
class Source:
    """A folder, and what of it is taken. Names of ours begin with the name of their part."""

    folder: Path
    parts: tuple[str, ...]
    rows: list[Row]
    fine: Mapping[str, str]  # pattern of a tensor that may be left over -> why
    # ours that may have more rows than theirs (the new ones start as the mean) -> theirs, as config.json says
    tables: Mapping[str, int] = field(default_factory=dict)
    # ours -> the one that it is; a file may hold it again, if it is equal
    tied: Mapping[str, str] = field(default_factory=dict)
    tensors: Callable[[Path], dict[str, StoredTensor]] = read_tensors  # of the folder, by their names


@dataclass
class Matched:
    """Our weights in a folder, and the report of it."""

    source: Source
    made: dict[str, Assembly] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # ours
    unknown: list[StoredTensor] = field(default_factory=list)  # left over, and nobody knows why
    left: dict[str, int] = field(default_factory=dict)  # why -> tensors left over
    misshapen: dict[str, str] = field(default_factory=dict)  # ours -> what is wrong
    grown: dict[str, int] = field(default_factory=dict)  # ours -> new rows

    def lines(self) -> list[str]:
        """For people: what was taken into which part, and what was not."""
        lines = [self._taken(part) for part in self.source.parts]
        lines += [
            f"{name}: {count} new rows start as the mean of the old ones"
            for name, count in self.grown.items()
        ]
        lines += [f"not taken from {self.source.folder}: {n} tensors, {why}" for why, n in self.left.items()]
        other = [f"not in {self.source.folder}, so fresh: {name}" for name in self.missing]
        other += [f"not taken, so fresh: {wrong}" for wrong in self.misshapen.values()]
        other += [f"not taken: {tensor}, which has no place in the model" for tensor in self.unknown]
        return lines + other

    def _taken(self, part: str) -> str:
        rows = [
            piece
            for name, made in self.made.items()
            for piece in made
            if name.startswith(part + ".") and isinstance(piece, Rows)
        ]
        size = sum(len(piece.rows) * piece.stored.row_bytes for piece in rows)
        dtypes = ", ".join(sorted({str(FLOATS[p.stored.dtype]).removeprefix("torch.") for p in rows}))
        return (
            f"{part} from {self.source.folder}: {len(rows)} tensors, {size:,} bytes of {dtypes or 'nothing'}"
        )


def match(source: Source, shapes: Shapes, allow: Collection[str] = ()) -> Matched:
    """`shapes`: of every weight of the model. `allow`: of missing, left_over, shape, what is no error.

    Raises ConfigError that names tensor and file. Reads headers alone.
    """
    stored, found = source.tensors(source.folder), Matched(source)
    try:
        pieces = to_ours({n: t.shape[0] if t.shape else 1 for n, t in stored.items()}, source.rows)
    except ValueError as error:
        raise ConfigError(f"{source.folder}: {error}") from None
    for name, of in pieces.of.items():
        if name in source.tied:
            _require_equal(name, [stored[piece.source] for piece in of], source, pieces.of, stored)
        elif name not in shapes:
            found.unknown += [stored[piece.source] for piece in of]
        else:
            _take(found, name, [_rows_of(piece, stored) for piece in of], shapes[name])
    _sort_out(found, [stored[name] for name in pieces.unused])
    own = [name for name in shapes if name.partition(".")[0] in source.parts]
    found.missing = [name for name in own if name not in found.made and name not in found.misshapen]
    _refuse(found, allow)
    return found


def _rows_of(piece: Piece, stored: Mapping[str, StoredTensor]) -> Rows:
    tensor = stored[piece.source]
    known = f"{tensor}: dtype {tensor.dtype} is no kind of weight here; known: {', '.join(FLOATS)}"
    require(tensor.dtype in FLOATS, known)
    return Rows(tensor, piece.rows, piece.transform, piece.whole)


def _take(found: Matched, name: str, rows: list[Rows], shape: tuple[int, ...]) -> None:
    made: list[Rows | Mean] = list(rows)
    held = sum(map(len, rows))
    said, more = found.source.tables.get(name, held), shape[0] - held
    if name in found.source.tables and more > 0:
        made.append(Mean(rows[0], more))
    theirs = " and ".join(f"{piece.stored} is {list(piece.stored.shape)}" for piece in rows)
    if held != said:
        found.misshapen[name] = f"{theirs}, but {found.source.folder}/config.json says {said} rows"
    elif any(not piece.stored.shape for piece in rows) or shape_of(made) != shape:
        found.misshapen[name] = f"{theirs}, but {name} is {list(shape)}"
    else:
        found.made[name] = made
        if more > 0:
            found.grown[name] = more


def _sort_out(found: Matched, unused: Iterable[StoredTensor]) -> None:
    for tensor in unused:
        reasons = (why for pattern, why in found.source.fine.items() if re.fullmatch(pattern, tensor.name))
        why = next(reasons, None)
        if why is None:
            found.unknown.append(tensor)
        else:
            found.left[why] = found.left.get(why, 0) + 1


def _refuse(found: Matched, allow: Collection[str]) -> None:
    """Raises ConfigError for the first thing that is wrong and not allowed."""
    folder, wrong = found.source.folder, found.misshapen
    if wrong and "shape" not in allow:
        first = next(iter(wrong.values()))
        raise ConfigError(
            f"{first}{_and_more(len(wrong))}: the weights are of another model than {folder}/config.json says"
        )
    allowed = f"; {ALLOW} = ['missing'] leaves it fresh"
    if found.missing and "missing" not in allow:
        first, held = found.missing[0], f"; left over is {found.unknown[0]}" if found.unknown else ""
        named = f"tensor {_theirs(first, found.source.rows)} ({first}) is not in {folder}"
        raise ConfigError(f"{named}{_and_more(len(found.missing))}{held}{allowed}")
    if found.unknown and "left_over" not in allow:
        more = _and_more(len(found.unknown))
        raise ConfigError(
            f"{found.unknown[0]} has no place in the model{more}; {ALLOW} = ['left_over'] leaves it out"
        )


def _and_more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _theirs(name: str, rows: list[Row]) -> str:
    return next(iter(to_theirs({name: 1}, rows).of))


def _require_equal(
    name: str,
    again: list[StoredTensor],
    source: Source,
    pieces: Mapping[str, list[Piece]],
    stored: Mapping[str, StoredTensor],
) -> None:
    """Raises ConfigError where a tied weight that is stored twice differs."""
    of = source.tied[name]
    require(of in pieces, f"{again[0]} is there, but not the {of} that it is tied to")
    tensor, other = again[0], stored[pieces[of][0].source]
    alike = tensor.shape == other.shape and tensor.dtype == other.dtype and tensor.dtype in FLOATS
    same = alike and bool(tensor.shape) and _equal(tensor, other)
    untie = "set tie_word_embeddings to false there"
    require(
        same, f"{tensor} is not {other.name}, but config.json ties the two (tie_word_embeddings): {untie}"
    )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    with one.file.open("rb") as first, other.file.open("rb") as second:
        return all(
            torch.equal(read_rows(one, first, rows), read_rows(other, second, rows))
            for rows in chunks(one, 0, one.shape[0])
        )
