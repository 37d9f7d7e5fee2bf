"""The files of folders and globs, local and remote; a folder that does not answer is not an empty one.

`glob`, `os.path.isfile` and the walks of fsspec pass over what they cannot read. A shard that is not on the
list for that is never read, and where a run goes on all others are dealt anew. So here errors are raised.
Links are followed, and a folder is entered once, however many links lead to it.
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

    def identity(self, folder: str) -> str:
        """The same for all paths that lead to a folder."""
        return os.path.realpath(folder)


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

    def identity(self, folder: str) -> str:
        """As Local.identity: its path."""
        return folder


Tree = Local | Remote


def local_files(folder: str) -> list[str]:
    """All files in it and its folders. Raises OSError."""
    return [path for _, entries in _walk(Local(), folder) for path, kind in entries if kind == FILE]


def local_glob(pattern: str) -> list[str]:
    """As glob.glob with `recursive`, but files alone. Raises OSError."""
    return _files_of(Local(), pattern)


def remote_files(system: AbstractFileSystem, path: str) -> list[str]:
    """All files in a folder and its folders. Raises what the client raises."""
    if _lists_by_itself(system):
        return system.find(path)
    entered = _walk(Remote(system), path)
    return [path for _, entries in entered for path, kind in entries if kind != FOLDER]


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


def _walk(tree: Tree, folder: str, hidden: bool = True) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """It and the folders below, each with the paths and kinds of what is in it; with what is `hidden`, or
    without.
    """
    entered, left = set[str](), [folder]
    while left:
        folder = left.pop()
        if (identity := tree.identity(folder)) in entered:
            continue
        entered.add(identity)
        names = [name for name in tree.names(folder) if hidden or not name.startswith(".")]
        paths = [os.path.join(folder, name) for name in names]
        entries = [(path, tree.kind(path)) for path in paths]
        left += [path for path, kind in reversed(entries) if kind == FOLDER]
        yield folder, entries


def _files_of(tree: Tree, pattern: str) -> list[str]:
    scheme, mark, below = pattern.partition("://")  # paths of HTTP have theirs
    start = scheme + mark if mark else "/" if pattern.startswith("/") else ""
    parts = [part for part in (below if mark else pattern).split("/") if part]
    return [file for file in dict.fromkeys(_matches(tree, start, parts)) if tree.kind(file) == FILE]


def _matches(tree: Tree, folder: str, parts: list[str]) -> Iterator[str]:
    head, *rest = parts
    if head == "**":
        for place, entries in _walk(tree, folder, hidden=False):
            yield from _matches(tree, place, rest) if rest else (path for path, _ in entries)
    elif glob.has_magic(head):
        for name in fnmatch.filter(tree.names(folder), head):
            if head.startswith(".") or not name.startswith("."):
                yield from _further(tree, os.path.join(folder, name), rest)
    else:
        yield from _further(tree, os.path.join(folder, head), rest)


def _further(tree: Tree, path: str, rest: list[str]) -> Iterator[str]:
    return _matches(tree, path, rest) if rest else iter((path,))
