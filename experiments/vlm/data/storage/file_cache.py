"""A folder of copies that may be thrown away: remote and packed shards, row groups, indices, fetched images.

Files are named by a hash of where they came from, appear under their name only when complete, and are made
once for all processes of the machine. A reader holds its file by a shared lock on it; so what is on the disk
is what the folder lists, files that are open and files that are being written too. When all of them together
exceed the limit, or the disk is full, those that nobody holds go, the longest unused first, and then what
this process can do without (`Holder`). Imports no torch.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import closing
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from experiments.vlm.cache_folder import cache_folder
from experiments.vlm.config import Data
from torchtitan.config.errors import ConfigError
from torchtitan.tools.disk import is_full
from torchtitan.tools.lock import wait_for_lock
from torchtitan.tools.logging import logger, warn_once

UNFINISHED = ".unfinished-"
GROWS_BY = 16 << 20  # bytes for which room is made at a time, where nobody knows how many there will be
# Set where a file is wanted soon, not now: it takes room only from what nobody holds.
no_hurry: ContextVar[bool] = ContextVar("no_hurry", default=False)


class NoRoom(Exception):
    """In `no_hurry`, the cache is full of what is being read: what can wait does without the file."""


class Holder(Protocol):
    """What holds files that it can get again."""

    def let_go(self) -> bool:
        """Let go of what was unused for longest; False where there is nothing."""


holders: "weakref.WeakSet[Holder]" = weakref.WeakSet()  # of this process


class Held:
    """A file that stays until it is closed, or nobody has this any more."""

    def __init__(self, path: Path, lock: int):
        self.path = path
        self._unlock = weakref.finalize(self, os.close, lock)

    def close(self) -> None:
        """Gives the lock up: the cache may delete the file."""
        self._unlock()


class CachedFile(NamedTuple):
    """A file of the folder as it is on the disk."""

    used_ns: int
    bytes: int  # on the disk, or reserved
    on_disk: int
    path: Path


class FileCache:
    """Files by the name of their origin, shared by all processes that use the folder."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder = folder
        self.limit_bytes = limit_bytes
        # The folder is measured again after a fiftieth of the limit was added, so it exceeds it by little.
        self._added = limit_bytes
        self._lock = threading.Lock()
        self._warned = False

    def hold(self, origin: str, make: Callable[[Path], None], suffix: str = "") -> Held:
        """The file made of `origin`; where it is not there yet, `make` writes it to the path that it gets.

        Raises what `make` raises, and OSError of a full disk.
        """
        path = self._path(origin, suffix)
        if held := _hold(path):
            return held
        path.parent.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(self.folder / "locks" / path.name[:3]):
            return _hold(path) or self._make(path, make)

    def get(self, origin: str, make: Callable[[Path], None], suffix: str = "") -> Path:
        """As `hold`, for a caller that reads the file at once: it may be thrown out at any time."""
        with closing(self.hold(origin, make, suffix)) as held:
            return held.path

    def note(self, origin: str, text: str) -> None:
        """Keep a text about `origin`, unless there is one."""

        def write(path: Path) -> None:
            path.write_text(text, errors="replace")

        self.get(origin, write)

    def noted(self, origin: str) -> str:
        """What `note` kept; empty where there is nothing."""
        held = _hold(self._path(origin, ""))
        if held is None:
            return ""
        with closing(held):
            return held.path.read_text(errors="replace")

    def make_room(self, size: int = 0, copy: Path | None = None) -> None:
        """Throw out what is too much, once `size` more bytes are to come; reserve them in `copy`, if given.

        Raises NoRoom in `no_hurry`, where that would take what this process holds.
        """
        with wait_for_lock(self.folder / "locks" / "room"):
            over = self._free(size)
            if over > 0 and no_hurry.get():
                raise NoRoom(f"{self.folder} has no room")
            if over > 0 and not self._warned:
                self._warned = True
                logger.warning(
                    f"{self.folder} is {over / 1e9:.3g} GB too small for the shards that are read at one "
                    f"time: data.cache_gb = {self.limit_bytes / 1e9:g}, and "
                    f"{shutil.disk_usage(self.folder).free / 1e9:.3g} GB are free on its disk"
                )
            if copy is not None:
                with copy.open("ab") as file:
                    file.truncate(size)

    def growing(self, copy: Path) -> io.BufferedRandom:
        """A file to write whose size is not known: room is made for it as it grows, as by `make_room`."""
        return io.BufferedRandom(_Growing(copy, self))

    def require_usable(self) -> None:
        """Raises ConfigError where no copies can be kept in the folder."""
        try:
            with wait_for_lock(self.folder / "locks" / "room"):
                pass
        except OSError as error:
            wrong = f"files cannot be written and locked there ({error.strerror})"
            raise ConfigError(f"data.cache_folder = {self.folder}: {wrong}; give another folder") from None

    def warn_if_small(self) -> None:
        """Warn, once, where the disk has less room than the cache may take. Raises as `require_usable`."""
        self.require_usable()
        held, free = sum(kept.bytes for kept in self._kept()), shutil.disk_usage(self.folder).free
        if held + free < self.limit_bytes:
            warn_once(
                f"data.cache_gb = {self.limit_bytes / 1e9:g}, but {self.folder} has room for "
                f"{(held + free) / 1e9:.3g} GB: that is what copies will take at most"
            )

    def _path(self, origin: str, suffix: str) -> Path:
        name = hashlib.sha256(origin.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return self.folder / name[:2] / (name + suffix)

    def _make(self, path: Path, make: Callable[[Path], None]) -> Held:
        """Where the disk is full, once more after all that can be had of the cache was thrown out."""
        try:
            return self._attempt(path, make)
        except OSError as error:
            if not is_full(error):
                raise
            if no_hurry.get():
                raise NoRoom(f"{self.folder} has no room") from error
        with wait_for_lock(self.folder / "locks" / "room"):
            self._free(self.limit_bytes)
        try:
            return self._attempt(path, make)
        except OSError as error:
            if not is_full(error):
                raise
            free = shutil.disk_usage(self.folder).free / 1e9
            left = f"{free:.3g} GB are free in {self.folder}, and what is left in it is being read"
            wrong = f"{error.strerror}: {left}; make room, or set data.cache_folder to a larger disk"
            raise OSError(error.errno, wrong) from error

    def _attempt(self, path: Path, make: Callable[[Path], None]) -> Held:
        held = _new_file(path.parent)
        try:
            make(held.path)
            self._count(held.path.stat().st_size)
            held.path.rename(path)
        except BaseException:
            held.path.unlink(missing_ok=True)
            held.close()
            raise
        held.path = path
        return held

    def _count(self, size: int) -> None:
        with self._lock:
            self._added += size
            if self._added < self.limit_bytes / 50:
                return
            self._added = 0
        self.make_room()

    def _free(self, more: int) -> int:
        """Throw out, and in a hurry let go, until `more` bytes fit; how many still do not."""
        over = self._throw_out(more)
        while over > 0 and not no_hurry.get() and any(holder.let_go() for holder in list(holders)):
            over = self._throw_out(more)
        return over

    def _throw_out(self, more: int) -> int:
        """Delete what nobody holds, the longest unused first, until `more` bytes fit; how many still do not.

        Where anything has to go, a tenth of the limit is made free.
        """
        kept = self._kept()
        total = sum(file.bytes for file in kept) + more
        on_disk = sum(file.on_disk for file in kept)
        limit = min(self.limit_bytes, on_disk + shutil.disk_usage(self.folder).free)
        if total <= limit:
            return 0
        for file in sorted(kept):
            if total <= limit * 0.9:
                break
            if _delete(file.path):
                total -= file.bytes
        return max(0, total - limit)

    def _kept(self) -> list[CachedFile]:
        kept = []
        for folder in self.folder.glob("??"):
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another process throws out too
                    stat = path.stat()
                    on_disk = stat.st_blocks * 512
                    kept.append(CachedFile(stat.st_atime_ns, max(stat.st_size, on_disk), on_disk, path))
        return kept


class _Growing(io.FileIO):
    def __init__(self, copy: Path, cache: FileCache):
        super().__init__(copy, "w+")
        self._cache, self._room = cache, 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size > self._room:
            self._room = max(size, min(GROWS_BY, self._cache.limit_bytes // 50))
            self._cache.make_room(self._room)
        self._room -= size
        return super().write(data)


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


def _hold(path: Path) -> Held | None:
    """None where it is not there. It counts as used just now, by the time of access: its own stays."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    held = Held(path, lock)
    fcntl.flock(lock, fcntl.LOCK_SH)
    stat = os.fstat(lock)
    if not stat.st_nlink:
        held.close()  # thrown out in between
        return None
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
    return held


def _new_file(folder: Path) -> Held:
    """One to be written, which nobody takes for one that was left behind."""
    while True:
        lock, name = tempfile.mkstemp(prefix=UNFINISHED, dir=folder)
        held = Held(Path(name), lock)
        fcntl.flock(lock, fcntl.LOCK_SH)
        if os.fstat(lock).st_nlink:
            return held
        held.close()


def _delete(path: Path) -> bool:
    """Unless somebody holds it, or writes it or a file derived from it."""
    owner = path
    if path.name.startswith(UNFINISHED):
        owner = path.with_name(UNFINISHED + path.name.removeprefix(UNFINISHED).partition(".")[0])
    try:
        lock = os.open(owner, os.O_RDWR)
    except FileNotFoundError:
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:  # else it is another file by now
            path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
