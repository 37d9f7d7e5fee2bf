"""Where everything lies below the output folder, and how a file appears there: whole or not at all.

OUT/00000.tar ...               finished shards; a shard without a sample has no file
OUT/rejects/00000.jsonl         a line for each record in no shard, and each image its document goes without
OUT/report.json                 counts and examples
OUT/.prepare/plan.json          the input, cut into shards, and the options that made it
OUT/.prepare/inputs/            packed inputs unpacked, and row groups that are wanted again
OUT/.prepare/urls/00000.npy     a hash of each image's URL            } and, next to each, which
OUT/.prepare/content/00000.npy  a hash of each image's bytes          } are not the first of their kind
OUT/.prepare/journal/00000/     what was fetched for a shard that is not collected yet
OUT/.prepare/images/00000.bin   the finished images of a shard, and 00000.json what became of each
OUT/.prepare/done/00000.json    the report of a finished shard
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np


@dataclass(frozen=True)
class Folder:
    """Where everything of a run lies; the picture above says what each file is."""

    out: Path

    @property
    def state(self) -> Path:
        """What is needed to go on; most of it is removed with the report."""
        return self.out / ".prepare"

    def tar(self, number: int) -> Path:
        """Shard `number`."""
        return self.out / f"{number:05d}.tar"

    def rejects(self, number: int) -> Path:
        """What was left out of shard `number`, JSON lines."""
        return self.out / "rejects" / f"{number:05d}.jsonl"

    @property
    def report(self) -> Path:
        """Counts and examples of the whole run; once it is there, the run is over."""
        return self.out / "report.json"

    @property
    def plan(self) -> Path:
        """The input cut into shards, and the options."""
        return self.state / "plan.json"

    @property
    def inputs(self) -> Path:
        """A folder of unpacked inputs and of row groups that are wanted again."""
        return self.state / "inputs"

    def hashes(self, of: str, number: int) -> Path:
        """A hash of each image of the shard, uint64 [n]; `of`: "urls" or "content"."""
        return self.state / of / f"{number:05d}.npy"

    def repeated(self, of: str, number: int) -> Path:
        """Which of `hashes` were in the input before, bool [n]."""
        return self.state / of / f"{number:05d}.repeated.npy"

    def journal(self, number: int) -> Path:
        """A folder of what was fetched for the shard."""
        return self.state / "journal" / f"{number:05d}"

    def images(self, number: int) -> Path:
        """The finished images of the shard, one after another."""
        return self.state / "images" / f"{number:05d}.bin"

    def image_index(self, number: int) -> Path:
        """What became of each image of the shard, and where in `images` it lies."""
        return self.state / "images" / f"{number:05d}.json"

    def done(self, number: int) -> Path:
        """The report of the shard, there once the shard is finished."""
        return self.state / "done" / f"{number:05d}.json"


@contextmanager
def appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, maybe by several processes: it takes its name when it is whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """The file appears whole or not at all."""
    with appearing(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "replace"))


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises FileNotFoundError."""
    return json.loads(path.read_bytes())


def write_array(path: Path, array: np.ndarray) -> None:
    """The file appears whole or not at all."""
    with appearing(path) as file:
        np.save(file, array)


def read_array(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """An array of one dimension that `write_array` wrote, mapped into memory: [n] of `dtype`.

    `np.load` would ask `ast` to read the header, which fails at times where several threads do so at once
    (Python 3.11).
    """
    with path.open("rb") as file:
        version, _ = np.lib.format.read_magic(file)
        size = int.from_bytes(file.read(2 if version == 1 else 4), "little")
        start = file.tell() + size
    count = (path.stat().st_size - start) // np.dtype(dtype).itemsize
    return np.memmap(path, dtype, "r", start, (count,)) if count else np.empty(0, dtype)


def remove(path: Path) -> None:
    """A file or a folder with all it holds, or nothing."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
