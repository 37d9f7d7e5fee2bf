"""What became of each URL of one shard, on disk the moment it is known.

    FOLDER/ATTEMPT.bin      the bytes that arrived, one answer after another
    FOLDER/ATTEMPT.jsonl    a line for each URL: where its bytes lie, or why there are none

An attempt (a process that works on the shard) writes files of its own and reads those of all before it. So a
process that was killed, or that a cluster believes dead although it still runs, disturbs nothing: a line cut
short is no line, and bytes without a line are nobody's.
"""

import json
import os
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """A URL that arrived (`reason` empty) or failed for good."""

    url: str
    offset: int = 0
    length: int = 0
    reason: str = ""
    detail: str = ""


class Journal:
    """The URLs of one shard that are settled, and an open attempt that settles more of them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.outcomes: dict[str, Outcome] = {}
        self._bins: dict[str, int] = {}  # url -> file descriptor that holds its bytes
        self._files: list[int] = []
        for lines in sorted(folder.glob("*.jsonl")):
            self._replay(lines)
        attempt = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        # Unbuffered: what was written survives the death of the process.
        self._bin = self._open(folder / f"{attempt}.bin", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._lines = self._open(folder / f"{attempt}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._end = 0

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            os.close(file)

    def __contains__(self, url: str) -> bool:
        return url in self.outcomes

    def arrived(self, url: str, data: bytes) -> None:
        """Note the bytes that came for an address; they outlive the process."""
        write_all(self._bin, data)
        self._log(Outcome(url, self._end, len(data)), self._bin)
        self._end += len(data)

    def failed(self, url: str, reason: str, detail: str) -> None:
        """Note why an address gave nothing."""
        self._log(Outcome(url, reason=reason, detail=detail), self._bin)

    def read(self, url: str) -> bytes:
        """The bytes of an address that arrived."""
        outcome = self.outcomes[url]
        return os.pread(self._bins[url], outcome.length, outcome.offset)

    def _log(self, outcome: Outcome, file: int) -> None:
        write_all(self._lines, json.dumps(asdict(outcome)).encode() + b"\n")
        self._keep(outcome, file)

    def _keep(self, outcome: Outcome, file: int) -> None:
        self.outcomes[outcome.url] = outcome
        self._bins[outcome.url] = file

    def _open(self, path: Path, flags: int) -> int:
        self._files.append(os.open(path, flags, 0o644))
        return self._files[-1]

    def _replay(self, lines: Path) -> None:
        file = self._open(lines.with_suffix(".bin"), os.O_RDONLY)
        size = os.fstat(file).st_size
        for line in lines.read_bytes().splitlines():
            try:
                outcome = Outcome(**json.loads(line))
            except (ValueError, TypeError):
                continue  # cut short by the end of its process
            # After a power failure the line may have reached the disk and the bytes not.
            if outcome.offset + outcome.length <= size:
                self._keep(outcome, file)


def write_all(file: int, data: bytes) -> None:
    """All of it, or an OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
