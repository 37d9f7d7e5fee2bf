"""Folders and files that are written whole, what to say when a disk is full, names that count up, and how
many files may be open.
"""

import contextlib
import errno
import json
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan.config.errors import ConfigError, require


def require_writable(folder: Path, key: str) -> None:
    """Make `folder` and a file in it that is gone at once. Raises ConfigError that names the option `key`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        detail = describe(error, folder)
        wrong = f"{key} = {folder}: cannot be written to ({detail})"
        raise ConfigError(f"{wrong}; give another folder, or mend this one") from None


def new_folder(out: str) -> Path:
    """The folder of --out, which is not there yet. Raises ConfigError."""
    require(bool(out), "--out is missing: which folder is to be written?")
    require(not Path(out).exists(), f"--out = {out}: is there already; give another folder, or delete it")
    return Path(out)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes --out at the end: half of one never bears that name.

    Raises ConfigError where there is no room, or no permission.
    """
    parent = out.absolute().parent
    require_writable(parent, "--out")
    with tempfile.TemporaryDirectory(prefix=out.name + ".", dir=parent) as folder:
        half = Path(folder) / "half"
        half.mkdir()
        try:
            yield half
            shutil.move(half, out)
        except OSError as error:
            if not is_full(error):
                raise
            raise ConfigError(f"--out = {out}: not written ({describe(error, parent)}): make room") from None


def write_whole(path: Path, text: str) -> None:
    """Write `text` so that the file has all of it or is as it was, whenever the process is killed."""
    unfinished = path.with_suffix(".tmp")
    # Half a pair of code units, which JSON may hold, is written as JSON escapes it.
    unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    unfinished.replace(path)


def write_json(file: Path, content: Any) -> None:
    """Write JSON as Hugging Face folders have it."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def next_number(folder: Path) -> int:
    """One more than the largest number that a name in `folder` begins with; 1 where there is none."""
    numbers = [int(match[0]) for path in folder.glob("*") if (match := re.match(r"\d+", path.name))]
    return max(numbers, default=0) + 1


def allow_open_files() -> None:
    """Let this process open as many files as it may ask for: shells allow 1,024 unless they are told."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # macOS says that there is no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def is_full(error: BaseException) -> bool:
    """Whether the error says that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def describe(error: OSError, path: Path) -> str:
    """The error in words; of a full disk with what is free."""
    reason = error.strerror or str(error)
    return f"{reason}; {free(path)} free" if is_full(error) else reason


def no_room(error: OSError) -> str:
    """The line on a disk that was full, with the file and what is free there where the error names a file."""
    name = error.filename
    why = describe(error, Path(name)) if name else error.strerror
    return f"{name or 'a file'} was not written ({why}): make room"


def free(path: Path) -> str:
    """Free space of the file system that holds `path`, which need not exist yet."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    mebibytes = shutil.disk_usage(there).free / 2**20
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"
