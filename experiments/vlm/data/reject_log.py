"""`rejects/RANK.jsonl`: a line for each rejected sample, image or shard, each once in a run whatever was
restarted.

`rejects/.RANK.index` next to it has 16 bytes a line, so that a resumed run need not parse the lines again. It
may be deleted, and may lag behind the lines.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from experiments.vlm.data.rejects import Reject
from torchtitan.tools.logging import logger

ENTRY = np.dtype([("identity", "<u8"), ("end", "<i8")])  # of a line: what it is about, where it ends
RECENT = 1 << 16  # identities that are kept as Python's numbers, of 80 bytes; more of them move to an array


class RejectLog:
    """Appends to this rank's file and reads the indices of the others, since a later epoch may deal a sample
    to another rank.

    The first of a reason in a shard is logged too, as a line for people; without a folder that is all.
    """

    def __init__(self, folder: Path | None, rank: int):
        self.path = folder / f"{rank}.jsonl" if folder else None
        self.known = Identities()
        self.lines: dict[Path, Lines] = {}  # of each rank
        self.logged: set[tuple[str, str]] = set()

    def write(self, rejects: Iterable[Reject], dealt_again: bool = True) -> None:
        """A line in the file for each that is new; the log gets the first of a reason and shard.

        `dealt_again`: whether another rank may have met them since this one began.
        """
        new = {identity: reject for reject in rejects if (identity := identity_of(reject)) not in self.known}
        if new and self.path is not None:
            self._catch_up(self.path, dealt_again or not self.lines)
            new = {identity: reject for identity, reject in new.items() if identity not in self.known}
            self.lines[self.path].append(new)
        self.known.add(new)
        for reject in new.values():
            self._log(reject)

    def _catch_up(self, own: Path, all_ranks: bool) -> None:
        """Know what this rank's file holds by now (loaders of the other split write there), or all files."""
        own.parent.mkdir(parents=True, exist_ok=True)
        own.touch()
        paths = list(own.parent.glob("*.jsonl")) if all_ranks else [own]
        lines = [self.lines.setdefault(path, Lines(path, own=path == own)) for path in paths]
        self.known.add_array(np.concatenate([of_rank.more() for of_rank in lines]))

    def _log(self, reject: Reject) -> None:
        kind = reject.shard, reject.reason
        if kind in self.logged:
            return
        self.logged.add(kind)
        more = f"; more of this kind in {self.path}" if self.path else "; more of this kind are not shown"
        logger.warning(
            f"source {reject.source}, shard {reject.shard}, sample {reject.key or '-'}: {reject}{more}"
        )


class Lines:
    """The lines of one rank, with their index. `own`: of this rank, who alone writes to both."""

    def __init__(self, path: Path, own: bool):
        self._path, self._own = path, own
        self._index = path.with_name(f".{path.stem}.index")
        self._end = 0  # bytes of the lines that are known
        self._entries = 0  # of the index, that are

    def more(self) -> np.ndarray:
        """Identities of the whole lines that were not known yet: from the index, and from the lines that it
        lacks. A line of this rank that a kill cut short is taken out.
        """
        size = os.path.getsize(self._path)
        if size == self._end:
            return np.empty(0, np.uint64)
        listed = self._listed(size)
        with self._path.open("rb") as file:
            file.seek(self._end)
            lines = file.read(size - self._end).splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        parsed = self._entries_of([identity_of(Reject(**json.loads(line))) for line in lines], lines)
        if self._own:
            os.truncate(self._path, self._end)
            self._write_index(parsed)
        return np.concatenate([listed["identity"], parsed["identity"]])

    def append(self, rejects: dict[int, Reject]) -> None:
        """Write a line for each, by its identity."""
        lines = [
            json.dumps(reject.line()).encode("utf-8", "backslashreplace") + b"\n"
            for reject in rejects.values()
        ]
        with self._path.open("ab") as file:
            file.writelines(lines)
        self._write_index(self._entries_of(rejects, lines))

    def _listed(self, size: int) -> np.ndarray:
        """More of the index, as far as the lines reach."""
        listed = np.empty(0, ENTRY)
        with contextlib.suppress(FileNotFoundError):
            listed = np.fromfile(self._index, ENTRY, offset=self._entries * ENTRY.itemsize)
        listed = listed[listed["end"] <= size]
        if len(listed):
            self._entries += len(listed)
            self._end = max(self._end, int(listed["end"][-1]))
        return listed

    def _entries_of(self, identities: Collection[int], lines: list[bytes]) -> np.ndarray:
        entries = np.empty(len(identities), ENTRY)
        entries["identity"] = list(identities)
        entries["end"] = self._end + np.cumsum([len(line) for line in lines], dtype=np.int64)
        self._end += sum(map(len, lines))
        return entries

    def _write_index(self, entries: np.ndarray) -> None:
        with self._index.open("ab") as file:
            file.truncate(self._entries * ENTRY.itemsize)
            file.write(entries.tobytes())
        self._entries += len(entries)


class Identities:
    """A set of numbers below 2^64 in 8 bytes each, but for the RECENT."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def __contains__(self, identity: int) -> bool:
        if identity in self._recent:
            return True
        place = int(self._sorted.searchsorted(np.uint64(identity)))
        return place < len(self._sorted) and int(self._sorted[place]) == identity

    def add(self, identities: Iterable[int]) -> None:
        """Add numbers."""
        self._recent.update(identities)
        if len(self._recent) > RECENT:
            self.add_array(np.fromiter(self._recent, np.uint64))
            self._recent.clear()

    def add_array(self, identities: np.ndarray) -> None:
        """Add an array of uint64."""
        if len(identities):
            # Some may come twice; NumPy's own union takes a hundred times as long.
            self._sorted = np.sort(np.concatenate([self._sorted, identities]))


def identity_of(reject: Reject) -> int:
    """What makes two of them the same, in every process, unlike `hash`."""
    # Images are numbered after others were lost: hence the reason.
    image = "" if reject.image is None else f"{reject.image} {reject.reason}"
    what = "\n".join((reject.shard, reject.key, image)).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(what, digest_size=8).digest()
    return int.from_bytes(digest, "little")
