"""The first stage of a shard, a hash of each image's URL; and which of all hashes are repeated.

Shards are worked on in any order, on any number of machines, so nothing can be decided on arrival. Every
shard writes the hashes of its images (64 bits; 0: none), and when all have, one pass over these files says of
each whether an earlier one is the same. Among a billion images one is taken for another with a probability of
3 %.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from experiments.vlm.data.formats.image_values import is_address, name_of
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.folder import Folder, read_array, write_array
from experiments.vlm.prepare.shard_plan import PrepareJob

PASS_HASHES = 1 << 26  # hashes that are compared in one pass: 2 GB of memory


def list_urls(job: PrepareJob, number: int) -> None:
    """Write a hash of each URL of a shard, 0 for an image that has none. Idempotent."""
    path = job.folder.hashes("urls", number)
    if not path.exists():
        records = (record for _, record in job.records(number) if not isinstance(record, Rejected))
        names = (name_of(image.value) for record in records for image in record.draft.images())
        write_array(path, np.array([url_hash(name) if is_address(name) else 0 for name in names], np.uint64))


def url_hash(url: str) -> int:
    """Hash of a URL without its fragment, which never reaches the server."""
    return (
        hash_of(hashlib.sha256(url.strip().partition("#")[0].encode("utf-8", "replace")).hexdigest())
        if url
        else 0
    )


def hash_of(sha256: str) -> int:
    """64 bits of a SHA-256; 0 for no hash at all, and only then."""
    return (int(sha256[:16], 16) or 1) if sha256 else 0


def mark_repeated(folder: Folder, of: str, shards: int) -> None:
    """Writes, next to the hashes of each shard, a boolean for each: is an earlier one the same?"""
    if all(folder.repeated(of, number).exists() for number in range(shards)):
        return
    hashes = [read_array(folder.hashes(of, number), np.uint64) for number in range(shards)]
    for number, repeated in enumerate(find_repeated(hashes)):
        write_array(folder.repeated(of, number), repeated)


def find_repeated(hashes: Sequence[np.ndarray], pass_hashes: int = PASS_HASHES) -> list[np.ndarray]:
    """Booleans for each array of uint64, in passes over a share of the values: memory is bounded."""
    starts = np.cumsum([0, *map(len, hashes)])
    repeated = np.ones(starts[-1], bool)
    passes = max(1, math.ceil(starts[-1] / pass_hashes))
    for number in range(passes):
        picked = [np.flatnonzero(array % np.uint64(passes) == number) for array in hashes]
        values = np.concatenate([array[index] for array, index in zip(hashes, picked, strict=True)])
        places = np.concatenate([index + start for index, start in zip(picked, starts, strict=False)])
        repeated[places[np.unique(values, return_index=True)[1]]] = False
        repeated[places[values == 0]] = False
    return np.split(repeated, starts[1:-1])
