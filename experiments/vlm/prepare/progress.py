"""How far a run is: a bar on a terminal, a line every ten seconds elsewhere, or sent to who shows it."""

import contextlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import BinaryIO, Protocol

REDRAW_EVERY_S = 0.1
LINE_EVERY_S = 10.0


class Advancing(Protocol):
    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        """size: bytes that came. before: done earlier, or without work, so it is not in the rate."""
        ...


class StageProgress(Advancing, Protocol):
    """What a run reports of itself: stages, how far each is, notes."""

    def stage(self, name: str, total: int) -> None: ...

    def note(self, text: str) -> None: ...


class Shown:
    """For people, on standard error.

    Not tqdm: that shows nothing on a terminal that does not know its size.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._every_s = REDRAW_EVERY_S if self._terminal else LINE_EVERY_S
        self._open = False

    def stage(self, name: str, total: int) -> None:
        self.close()
        self._name, self._total = name, total
        self._count = self._before = self._failed = self._size = 0
        self._begun = self._told = time.monotonic()
        self._open = True

    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        self._count += count
        self._failed += failed
        self._size += size
        self._before += count * before
        if time.monotonic() - self._told >= self._every_s:
            self._tell()

    def note(self, text: str) -> None:
        self._print(text, "\n")

    def close(self) -> None:
        """Ends the stage with a line that stays."""
        if self._open:
            self._open = False
            self._tell("\n")

    def _tell(self, end: str = "") -> None:
        self._told = time.monotonic()
        if not self._terminal:
            return self._print(self.describe(), "\n")
        text = self.describe()
        width = max(10, shutil.get_terminal_size().columns - len(text) - 4)
        filled = width * self._count // max(self._total, 1)
        self._print(f"{text} [{'=' * filled}{' ' * (width - filled)}]", end)

    def _print(self, text: str, end: str) -> None:
        start = "\r\x1b[K" if self._terminal else ""  # over the bar that stands there
        print(start + text, end=end, file=sys.stderr, flush=True)

    def describe(self) -> str:
        """How far, how fast, how much longer; failures and megabytes a second where there are any."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        rate = (self._count - self._before) / seconds
        parts = [f"{self._name}: {self._count} of {self._total}", f"{rate:.1f}/s"]
        if self._open and rate:
            parts.append(f"{timedelta(seconds=round((self._total - self._count) / rate))} left")
        if self._size:
            parts.append(f"{self._size / 1e6 / seconds:.1f} MB/s")
        if self._failed:
            parts.append(f"{self._failed} failed")
        return ", ".join(parts)


@dataclass(frozen=True)
class JsonProgress:
    """A StageProgress that writes everything down as lines of JSON.

    When nobody reads any more, that is no fault.
    """

    file: BinaryIO

    def stage(self, name: str, total: int) -> None:
        self.send("stage", name, total)

    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        self.send("advance", count, failed, size, before)

    def note(self, text: str) -> None:
        self.send("note", text)

    def send(self, name: str, *arguments: object) -> None:
        with contextlib.suppress(OSError):
            self.file.write(json.dumps([name, arguments]).encode() + b"\n")


class Counted:
    """Passes on what one shard advances, and counts it."""

    def __init__(self, progress: StageProgress) -> None:
        self._progress = progress
        self.count = 0

    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        self.count += count
        self._progress.advance(count, failed, size, before)

    def fill(self, total: int) -> None:
        """What needed no work is done too."""
        self.advance(total - self.count, before=True)
