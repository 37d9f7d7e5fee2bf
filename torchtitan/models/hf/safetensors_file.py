"""Safetensors files by their headers: what they hold, whether they are whole, and rows of a tensor.

    8 bytes        length n of the header, little endian
    n bytes        JSON: name -> dtype, shape, [begin, end) in what follows; and "__metadata__", texts
    the rest       the tensors, without gaps

So rows of a tensor are read without the rest of it, and a file that was cut short, or whose header or lengths
were damaged, is refused before anything is read of it. Imports no torch: it is asked before torch loads.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torchtitan.config.errors import ConfigError, require

# Their names of dtypes -> bytes of an element. The names of torch: tensors.py.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
    "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
HEADER_LIMIT = 100_000_000  # bytes, as in the format's own library
AGAIN = "fetch or write it again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. Whole and in order: `read_header` saw to it."""

    name: str
    file: Path
    dtype: str  # of DTYPE_BYTES
    shape: tuple[int, ...]
    begin: int  # its first byte in the file

    @property
    def row_bytes(self) -> int:
        """Bytes of a row along dim 0; a number alone is its own row."""
        return math.prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"tensor {self.name} in {self.file}"

    def read_rows(self, file: BinaryIO, rows: range, into: memoryview) -> None:
        """Read the bytes of these rows. Raises ConfigError where the file has become shorter since."""
        file.seek(self.begin + rows.start * self.row_bytes)
        require(file.readinto(into) == len(into), f"{self}: the file ends too early: {AGAIN}")  # type: ignore[attr-defined]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. Raises ConfigError where it is not a whole safetensors file."""
    damaged = f"{path}: is no safetensors file, or damaged"
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            possible = size >= 8 and 2 <= length <= min(size - 8, HEADER_LIMIT)
            header: Any = json.loads(file.read(length)) if possible else None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{damaged} (its header is not JSON): {AGAIN}") from None
    require(possible, f"{damaged} (header): {AGAIN}")
    require(isinstance(header, dict), f"{damaged} (its header is no table): {AGAIN}")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    _require_whole(path, sorted(entries.values(), key=lambda entry: entry[2]), size - 8 - length)
    return {
        name: StoredTensor(name, path, dtype, shape, 8 + length + begin)
        for name, (dtype, shape, begin, _, _) in entries.items()
    }


Entry = tuple[str, tuple[int, ...], int, int, str]  # dtype, shape, begin, end, what to call it in an error


def _entry(path: Path, name: str, entry: Any) -> Entry:
    where = f"tensor {name} in {path}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        numbers = False
    require(numbers, f"{where}: its entry in the header is damaged: {AGAIN}")
    require(dtype in DTYPE_BYTES, f"{where}: dtype {dtype!r} is not known; known: {', '.join(DTYPE_BYTES)}")
    bytes_ = math.prod(shape) * DTYPE_BYTES[dtype]
    lengths = f"{where}: {list(shape)} of {dtype} are {bytes_} bytes, but it has {end - begin}"
    require(bytes_ == end - begin, f"{lengths}: the header is damaged: {AGAIN}")
    return dtype, shape, begin, end, where


def _require_whole(path: Path, entries: Iterable[Entry], size: int) -> None:
    """Raises ConfigError unless tensors follow each other without gaps, to the end of the file."""
    expected = 0
    for _, _, begin, end, where in entries:
        require(begin == expected, f"{where}: begins at byte {begin}, not {expected}: damaged: {AGAIN}")
        require(end <= size, f"{where}: the file was cut short, {end - size} bytes are missing: {AGAIN}")
        expected = end
    require(expected == size, f"{path}: {size - expected} bytes after its last tensor: damaged: {AGAIN}")


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The header of a file of these tensors: name -> (dtype, shape), in the order in which they follow."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
