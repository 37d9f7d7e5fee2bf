"""The samples of a tar by number, as WebDataset has them.

    a/0001.jpg, a/0001.txt, a/0001.seg.png    one sample of key "a/0001" with members "jpg", "txt", "seg.png"

A key is the path up to the first dot of the file's name. Members of a sample need not be neighbours; where
an extension comes a second time, it and its neighbours of that key are a new sample. What is kept is 8 bytes
a member, in the cache folder too, so that a tar is searched once for all slots, runs and epochs: names and
sizes are read again from the headers. Python's tarfile takes ten times as long, and a loader opens a shard
for each of its slots; webdataset reads in sequence, where a sample that waits for its slot must be read again
by its number.
"""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np

from experiments.vlm.data.formats.json_index import read_at
from experiments.vlm.data.formats.tar_header import Headers, Member
from experiments.vlm.data.formats.tar_search import READ_BYTES, Samples, find_samples
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.file_cache import FileCache, origin_of

VERSION = "samples 3"  # of what is kept: another number where the same tar would give other samples


def _to_bytes(samples: Samples) -> bytes:
    damage = [samples.damage.reason, samples.damage.detail] if samples.damage else None
    head = {"members": len(samples.headers), "checksum": samples.checksum, "damage": damage}
    places = np.concatenate([samples.headers, samples.starts]).astype("<i8")
    return json.dumps(head).encode() + b"\n" + places.tobytes()


def _from_bytes(data: bytes) -> Samples:
    """Raises ValueError or KeyError where these are none."""
    head, _, places = data.partition(b"\n")
    known, numbers = json.loads(head), np.frombuffer(places, "<i8").astype(np.int64)
    damage = Rejected(*known["damage"]) if known["damage"] else None
    return Samples(numbers[: known["members"]], numbers[known["members"] :], known["checksum"], damage)


class TarIndex:
    """Samples of an opened tar by number. `damage`: what is wrong with the tar as a whole, if anything is."""

    def __init__(self, file: int, found: Samples | None = None):
        """`found`: what was found in it before."""
        self._headers = Headers(partial(read_at, file))
        self.found = found or find_samples(file)
        self.damage = self.found.damage

    def __len__(self) -> int:
        return len(self.found.starts) - 1

    def sample(self, index: int) -> list[Member]:
        """The members in the order of the tar. Raises Rejected where the file has changed."""
        first, end = self.found.starts[index : index + 2]
        return [self._member(int(start)) for start in self.found.headers[first:end]]

    def key(self, index: int) -> str:
        """What the members of a sample have in common. Raises Rejected where the file has changed."""
        return self._member(int(self.found.headers[self.found.starts[index]])).key

    def _member(self, start: int) -> Member:
        header = self._headers.at(start)
        member = header.member() if header else None
        if member is None:
            raise Rejected("shard_unreadable", f"it has changed at byte {start} since it was opened")
        return member


def open_index(file: int, path: str, cache: FileCache) -> TarIndex:
    """The index of the tar at `path`, which is open as `file`: kept in the cache, 8 bytes a member."""
    if os.fstat(file).st_size <= READ_BYTES:
        return TarIndex(file)  # one read finds all of it
    found: list[Samples] = []

    def keep(copy: Path) -> None:
        found.append(find_samples(file))
        copy.write_bytes(_to_bytes(found[0]))

    try:
        kept = cache.get(f"{origin_of(path)} {VERSION}", keep, ".index").read_bytes()
        return TarIndex(file, found[0] if found else _from_bytes(kept))
    except (OSError, ValueError, KeyError):  # of the cache; what is wrong with the tar itself comes again
        return TarIndex(file, found[0] if found else None)
