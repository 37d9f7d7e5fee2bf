"""The files of folders and globs, local and remote; a folder that does not answer is not an empty one.

`glob`, `os.path.isfile` and the walks of fsspec pass over what they cannot read. A shard that is not on the
list for that is never read, and where a run goes on all others are dealt anew. So here errors are raised.
"""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator

from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from experiments.vlm.data.storage.outages import is_away

FILE, FOLDER, OTHER = "file", "directory", "other"  # as fsspec calls them


class Local:
    """Folders of this machine. Raises what the storage raises, but for what is not there."""

    def names(self, folder: str) -> list[str]:
        """What is in a folder, sorted; nothing where there is none."""
        try:
            with os.scandir(folder or ".") as entries:
                return sorted(entry.name for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def kind(self, path: str) -> str:
        """What is there; a link counts as what it leads to."""
        try:
            mode = os.stat(path).st_mode
        except (OSError, ValueError) as error:
            if is_away(error):
                raise
            return OTHER
        return FOLDER if stat.S_ISDIR(mode) else FILE if stat.S_ISREG(mode) else OTHER


class Remote:
    """As Local, of a remote storage. Each folder is asked for once."""

    def __init__(self, system: AbstractFileSystem):
        self.system = system
        self.kinds: dict[str, str] = {}

    def names(self, folder: str) -> list[str]:
        """As Local.names."""
        try:
            entries = self.system.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = {entry["name"].rstrip("/"): entry["type"] for entry in entries}
        found.pop(folder.rstrip("/"), None)  # itself, where it is a file or a store of keys
        self.kinds |= found
        return sorted(name.rpartition("/")[2] for name in found)

    def kind(self, path: str) -> str:
        """As Local.kind; `isdir` of a file system takes what it cannot ask for a file."""
        if path not in self.kinds:
            try:
                self.kinds[path] = self.system.info(path)["type"]
            except FileNotFoundError:
                self.kinds[path] = OTHER
        return self.kinds[path]


Tree = Local | Remote


def local_files(folder: str) -> list[str]:
    """All files in it and its folders, links to folders left out. Raises OSError."""

    def refuse(error: OSError) -> None:
        raise error

    walk = os.walk(folder, onerror=refuse)
    found = (os.path.join(place, name) for place, _, names in walk for name in names)
    return [file for file in found if Local().kind(file) == FILE]


def local_glob(pattern: str) -> list[str]:
    """As glob.glob with `recursive`, but files alone. Raises OSError."""
    return _files_of(Local(), pattern)


def remote_files(system: AbstractFileSystem, path: str) -> list[str]:
    """All files in a folder and its folders. Raises what the client raises."""
    return system.find(path) if _lists_by_itself(system) else list(_below(Remote(system), path))


def remote_glob(system: AbstractFileSystem, pattern: str) -> list[str]:
    """What a glob means, files alone. Raises what the client raises."""
    if not _lists_by_itself(system):
        return _files_of(Remote(system), pattern)
    found = system.glob(pattern, detail=True)
    return [path for path, entry in found.items() if entry["type"] != FOLDER]


def _lists_by_itself(system: AbstractFileSystem) -> bool:
    """Whether it has another way to list than fsspec's walk, which passes over folders that do not answer."""
    base, name = (
        (AsyncFileSystem, "_find") if isinstance(system, AsyncFileSystem) else (AbstractFileSystem, "find")
    )
    return getattr(type(system), name, None) is not getattr(base, name)


def _below(tree: Tree, folder: str) -> Iterator[str]:
    for name in tree.names(folder):
        path = f"{folder.rstrip('/')}/{name}" if folder else name
        if tree.kind(path) == FOLDER:
            yield from _below(tree, path)
        else:
            yield path


def _files_of(tree: Tree, pattern: str) -> list[str]:
    scheme, mark, below = pattern.partition("://")  # paths of HTTP have theirs
    start = scheme + mark if mark else "/" if pattern.startswith("/") else ""
    parts = [part for part in (below if mark else pattern).split("/") if part]
    return [file for file in dict.fromkeys(_matches(tree, start, parts)) if tree.kind(file) == FILE]


def _matches(tree: Tree, folder: str, parts: list[str]) -> Iterator[str]:
    head, *rest = parts
    if head == "**":
        yield from _matches(tree, folder, rest) if rest else ()
        for name in tree.names(folder):
            path = os.path.join(folder, name)
            if not name.startswith(".") and tree.kind(path) == FOLDER:
                yield from _matches(tree, path, parts)
            elif not name.startswith(".") and not rest:
                yield path
    elif glob.has_magic(head):
        for name in fnmatch.filter(tree.names(folder), head):
            if head.startswith(".") or not name.startswith("."):
                yield from _further(tree, os.path.join(folder, name), rest)
    else:
        yield from _further(tree, os.path.join(folder, head), rest)


def _further(tree: Tree, path: str, rest: list[str]) -> Iterator[str]:
    return _matches(tree, path, rest) if rest else iter((path,))
