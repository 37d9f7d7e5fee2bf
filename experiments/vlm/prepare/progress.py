"""How far a run is: for people on standard error, or sent as JSON to the process that shows it."""

import contextlib
import json
import math
import shutil
import sys
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from tqdm import tqdm

LINE = "{desc}: {n} of {total}, {rate_noinv_fmt}, {remaining} left{postfix}"
REDRAW_EVERY_S = 0.1
LINE_EVERY_S = 10.0


class StageProgress(Protocol):
    """What a run reports of itself: stages, how far each is, notes."""

    def stage(self, name: str, total: int) -> None:
        """Ends the stage before, and begins one of `total` pieces of work, which its name says."""

    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        """size: bytes that came. before: done earlier, or without work, so it is not in the rate."""

    def note(self, text: str) -> None:
        """A line for people, at once."""


class ConsoleProgress:
    """For people: a bar where standard error is a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def stage(self, name: str, total: int) -> None:
        """Ends the stage before with a line that stays, and begins one."""
        self.close()
        self._failed = self._size = 0
        terminal = sys.stderr.isatty()
        # A terminal may not know its size: tqdm would show nothing there.
        columns, lines = shutil.get_terminal_size() if terminal else (None, None)
        self._bar = tqdm(
            total=total,
            desc=name,
            bar_format=LINE + " [{bar}]" if terminal else LINE,
            ncols=columns,
            nrows=lines,
            file=sys.stderr if terminal else _Lines(),
            mininterval=REDRAW_EVERY_S if terminal else LINE_EVERY_S,
            maxinterval=math.inf,
            miniters=1,
            smoothing=0,  # the rate is that of the whole stage
            unit="",
        )

    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        """Counts; failures and megabytes a second are shown where there are any."""
        assert self._bar is not None, "no stage has begun"
        self._failed += failed
        self._size += size
        self._bar.initial += count * before
        seconds = max(self._bar.format_dict["elapsed"], 1e-9)
        rate = [f"{self._size / 1e6 / seconds:.1f} MB/s"] if self._size else []
        failures = [f"{self._failed} failed"] if self._failed else []
        self._bar.set_postfix_str(", ".join(rate + failures), refresh=False)
        self._bar.update(count)

    def note(self, text: str) -> None:
        """A line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends the stage with a line that stays."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Lines:
    """What tqdm draws over and over, as lines of standard error."""

    last = ""

    def write(self, text: str) -> None:
        if (line := text.strip()) and line != self.last:
            print(line, file=sys.stderr)
            self.last = line

    def flush(self) -> None:
        sys.stderr.flush()


@dataclass(frozen=True)
class JsonProgress:
    """A StageProgress in lines of JSON. When nobody reads them any more, that is no fault."""

    file: BinaryIO

    def stage(self, name: str, total: int) -> None:
        """["stage", [name, total]]."""
        self.send("stage", name, total)

    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        """["advance", [count, failed, size, before]]."""
        self.send("advance", count, failed, size, before)

    def note(self, text: str) -> None:
        """["note", [text]]."""
        self.send("note", text)

    def send(self, name: str, *arguments: object) -> None:
        """One line: which method of a StageProgress the reader calls, and with what."""
        with contextlib.suppress(OSError):
            self.file.write(json.dumps([name, arguments]).encode() + b"\n")


class ShardProgress:
    """Passes on what one shard advances, and counts it."""

    def __init__(self, progress: StageProgress) -> None:
        self._progress = progress
        self.count = 0

    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        """As StageProgress.advance."""
        self.count += count
        self._progress.advance(count, failed, size, before)

    def fill(self, total: int) -> None:
        """What needed no work is done too."""
        self.advance(total - self.count, before=True)
