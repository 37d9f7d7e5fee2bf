"""A folder of copies that may be thrown away: remote and packed shards, row groups, fetched images.

Files are named by a hash of where they came from, appear under their name only when complete, and are made
once for all processes of the machine. When all of them together exceed the limit, those that were used
longest ago go; a file that a process has open stays readable for it (POSIX). Imports no torch.
"""

import fcntl
import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.vlm.cache_folder import cache_folder
from experiments.vlm.config import Data


class FileCache:
    """Files by the name of their origin, shared by all processes that use the folder."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder = folder
        self.limit_bytes = limit_bytes
        # The folder is measured again after a fiftieth of the limit was added, so it exceeds it by little.
        self._added = limit_bytes
        self._lock = threading.Lock()

    def get(self, origin: str, make: Callable[[Path], None], suffix: str = "") -> Path:
        """The file made of `origin`; where it is not there yet, `make` writes it to the path that it gets."""
        path = self._path(origin, suffix)
        if not _used(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / "locks" / path.name[:3]):
                if not _used(path):
                    self._make(path, make)
        return path

    def find(self, origin: str, suffix: str = "") -> Path | None:
        """The file made of `origin`, if it is there."""
        path = self._path(origin, suffix)
        return path if _used(path) else None

    def _path(self, origin: str, suffix: str) -> Path:
        name = hashlib.sha256(origin.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return self.folder / name[:2] / (name + suffix)

    def _make(self, path: Path, make: Callable[[Path], None]) -> None:
        handle, name = tempfile.mkstemp(prefix=".unfinished-", dir=path.parent)
        os.close(handle)
        unfinished = Path(name)
        try:
            make(unfinished)
            size = unfinished.stat().st_size
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
        with self._lock:
            self._added += size
            if self._added >= self.limit_bytes / 50:
                self._added = 0
                self._trim(path)

    def _trim(self, newest: Path) -> None:
        """Delete what was used longest ago until nine tenths of the limit are left; never the newest."""
        found = []
        for path in self.folder.glob("??/*"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # another process trims too
            found.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self.limit_bytes:
            return
        for _, size, path in sorted(found):
            if total <= self.limit_bytes * 0.9:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


def file_cache(data: Data) -> FileCache:
    """The cache of data.cache_folder, one for each process."""
    return _file_cache(cache_folder(data.cache_folder) / "copies", int(data.cache_gb * 1e9))


_file_cache = functools.cache(FileCache)


def origin_of(path: str) -> str:
    """A name for a file that changes when a local file does; a remote one is taken not to change."""
    if "://" in path:
        return path
    stat = os.stat(path)
    return f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"


def _used(path: Path) -> bool:
    """Whether it is there; then it counts as used just now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
