"""A file system that fails on purpose, and a clock that passes only where somebody waits for it.

    flaky://NAME        the file NAME of Store.folder

What is wrong begins at operations drawn from a seed (ls, info, open, and each read of a file), and lasts for
seconds of that clock. Which thread meets it is chance: what a run delivers may not depend on it.
"""

import errno
import io
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from experiments.vlm.data.storage import outages
from experiments.vlm.data.storage.outages import Retry


class Busy(Exception):
    """As clients tell of HTTP 429: a kind of its own."""

    status = 429


ERRORS: dict[str, Callable[[], Exception]] = {
    "EIO": lambda: OSError(errno.EIO, "Input/output error"),
    "429": lambda: Busy("429 Too Many Requests"),
    "timeout": lambda: TimeoutError("the read timed out"),
    "credentials": lambda: PermissionError("the token has expired"),
    "too many open files": lambda: OSError(errno.EMFILE, "Too many open files"),
    "reset": lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
}
SILENT = ("slow", "short reads", "wrong lengths")
KINDS = (*ERRORS, *SILENT)


class Store:
    """What is wrong, and when. `away`: from now on for good."""

    def __init__(self, folder: Path, kinds: tuple[str, ...], seed: int, chance: float = 0.05):
        self.folder, self.kinds, self.chance = folder, kinds, chance
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.now, self.until, self.kind = 0.0, 0.0, ""
        self.away = False
        self.operations = self.failures = 0

    def operate(self) -> str:
        """One operation. Raises where that fails, or returns what else is wrong with it."""
        with self.lock:
            self.operations += 1
            self.now += 0.01
            if self.now >= self.until and self.kinds and self.random.random() < self.chance:
                self.kind = self.random.choice(self.kinds)
                self.until = self.now + self.random.choice((1.0, 20.0, 100.0))
            wrong = "EIO" if self.away else self.kind if self.now < self.until else ""
            self.failures += bool(wrong)
            if wrong == "slow":
                self.now += 15
        if wrong in ERRORS:
            raise ERRORS[wrong]()
        return wrong

    def rest(self, seconds: float) -> None:
        with self.lock:
            self.now += seconds

    @contextmanager
    def serving(self, monkeypatch) -> Iterator["Store"]:
        """While it serves flaky:// and its clock is that of who waits."""
        with monkeypatch.context() as patched:
            patched.setattr(outages, "clock", lambda: self.now)
            patched.setattr(Retry, "rest", lambda _, seconds: self.rest(seconds))
            patched.setattr(FlakyFileSystem, "store", self, raising=False)
            yield self


class FlakyFile(io.BytesIO):
    """Read whole; each read is an operation."""

    def __init__(self, store: Store, data: bytes, size: int):
        super().__init__(data)
        self.store, self.size = store, size

    def read(self, size: int | None = -1) -> bytes:
        wrong = self.store.operate()
        return b"" if wrong == "short reads" else super().read(size)


class FlakyFileSystem(AbstractFileSystem):
    """Reads `store`."""

    protocol = "flaky"
    cachable = False
    store: Store

    def ls(self, path: str, detail: bool = True, **_: Any) -> list:
        self.store.operate()
        folder = self.store.folder / self._strip_protocol(path)
        if not folder.is_dir():
            raise FileNotFoundError(path)
        entries = [self._entry(file) for file in sorted(folder.iterdir())]
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path: str, **_: Any) -> dict:
        if "*" in path:
            raise ValueError(f"{path}: no name of this store")
        wrong = self.store.operate()
        file = self.store.folder / self._strip_protocol(path)
        if not file.exists():
            raise FileNotFoundError(path)
        entry = self._entry(file)
        return entry | {"size": entry["size"] // 2} if wrong == "wrong lengths" else entry

    def _open(self, path: str, mode: str = "rb", **_: Any) -> FlakyFile:
        size = self.info(path)["size"]
        self.store.operate()
        return FlakyFile(self.store, (self.store.folder / self._strip_protocol(path)).read_bytes(), size)

    def _entry(self, file: Path) -> dict:
        kind = "directory" if file.is_dir() else "file"
        name = file.relative_to(self.store.folder).as_posix()
        return {"name": name, "type": kind, "size": file.stat().st_size}


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
