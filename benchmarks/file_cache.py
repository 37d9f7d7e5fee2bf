"""How much disk does the cache take, while several processes read more through it than it may hold?

    python -m benchmarks.file_cache --folder FOLDER [--shards 100] [--cache_gb 1] [--processes 4]

Every process opens all shards in an order of its own, the next one ahead, and reads each record's key, as
processes of several runs do that share data.cache_folder. What the disk holds is measured from outside by
statvfs, files that are open without a name too; so let FOLDER lie on a file system that nobody else uses,
such as a tmpfs:

    unshare -rm bash -c 'mount -t tmpfs -o size=1200M tmpfs /tmp/cache && python -m benchmarks.file_cache ...'

Expected: the limit, and at most a shard a process above it where all the rest is being read by others. On a
disk that is smaller than data.cache_gb, the disk.
"""

import argparse
import multiprocessing
import os
import random
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

from experiments.vlm.config import Data, Source
from experiments.vlm.data.formats.shard import Shard
from experiments.vlm.data.sources.shard_cache import ShardCache
from experiments.vlm.data.sources.shards import list_shards, open_shard
from experiments.vlm.data.storage.outages import Retry

MEMBER = 1 << 20


def write_shards(folder: Path, shards: int, megabytes: int) -> None:
    """A sample a megabyte, which no compression of a file system makes smaller."""
    noise = os.urandom(MEMBER)
    for shard in range(shards):
        with open(folder / f"{shard:03}.tar", "wb") as file:
            for record in range(megabytes):
                header = tarfile.TarInfo(f"{shard:03}-{record:04}.jpg")
                header.size = MEMBER
                file.write(header.tobuf() + noise)
            file.write(bytes(1024))


def read_all(source: Path, data: Data, seed: int) -> None:
    """Raises AssertionError where a key is not that of its shard."""
    paths = list_shards(f"file://{source}", "cc12m", data)
    random.Random(seed).shuffle(paths)
    cache = ShardCache(partial(_open, data), 100, Retry(0))
    for path, following in zip(paths, [*paths[1:], paths[0]], strict=True):
        cache.ahead(0, following)
        keys = cache.use(0, path, lambda shard: [shard.key(record) for record in range(len(shard))])
        assert {key.partition("-")[0] for key in keys} == {Path(path).stem}
    cache.close()


def _open(data: Data, source: int, path: str) -> Shard:
    return open_shard(path, Source(format="cc12m"), data)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--shard_mb", type=int, default=100)
    parser.add_argument("--cache_gb", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=4)
    options = parser.parse_args()
    data = Data(cache_folder=str(options.folder), cache_gb=options.cache_gb)
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as source:
        write_shards(Path(source), options.shards, options.shard_mb)
        processes = [
            context.Process(target=read_all, args=(Path(source), data, seed))
            for seed in range(options.processes)
        ]
        before, peak, began = _used(options.folder), 0, time.perf_counter()
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            peak = max(peak, _used(options.folder) - before)
            time.sleep(0.05)
    print(
        f"{options.shards * options.shard_mb / 1e3:g} GB of shards, data.cache_gb = {options.cache_gb:g}, "
        f"{options.processes} processes: at most {peak / 1e9:.3f} GB on the disk, exit codes "
        f"{[process.exitcode for process in processes]}, {time.perf_counter() - began:.0f} s"
    )


def _used(folder: Path) -> int:
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


if __name__ == "__main__":
    main()
