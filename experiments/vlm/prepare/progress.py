"""How far a run is: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from typing import Protocol

from tqdm import tqdm

LINE_EVERY_S = 10.0


class Advancing(Protocol):
    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        """size: bytes that came. before: done in an earlier run, or without work, so it does not count in the rate."""
        ...


class Progress(Advancing, Protocol):
    def stage(self, name: str, total: int) -> None: ...

    def note(self, text: str) -> None: ...


class Shown:
    """For people, on standard error."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._terminal = sys.stderr.isatty()

    def stage(self, name: str, total: int) -> None:
        self.close()
        self._name, self._total = name, total
        self._count = self._before = self._failed = self._size = 0
        self._begun = self._told = time.monotonic()
        self._bar = tqdm(total=total, desc=name, unit="", unit_scale=True, disable=not self._terminal, dynamic_ncols=True)

    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        self._count += count
        self._failed += failed
        self._size += size
        self._before += count * before
        assert self._bar is not None
        self._bar.initial = self._before
        self._bar.set_postfix_str(self._extra(), refresh=False)
        self._bar.update(count)
        if not self._terminal and time.monotonic() - self._told >= LINE_EVERY_S:
            self._print()

    def note(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            if not self._terminal:
                self._print()

    def _print(self) -> None:
        self._told = time.monotonic()
        rate = (self._count - self._before) / max(self._told - self._begun, 1e-9)
        print(f"{self._name}: {self._count} of {self._total}, {rate:.1f}/s{self._extra(', ')}", file=sys.stderr, flush=True)

    def _extra(self, start: str = "") -> str:
        """Failures and megabytes a second, where there are any."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        parts = [f"{self._failed} failed"] * bool(self._failed) + [f"{self._size / 1e6 / seconds:.1f} MB/s"] * bool(self._size)
        return start + ", ".join(parts) if parts else ""


class Counted:
    """Passes on what one shard advances, and counts it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.count = 0

    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        self.count += count
        self._progress.advance(count, failed, size, before)

    def fill(self, total: int) -> None:
        """What needed no work is done too."""
        self.advance(total - self.count, before=True)
