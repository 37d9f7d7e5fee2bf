"""A worker of cache.py: python -m experiments.vlm.world NAME SEED FOLDER SHARD ... draws these shards."""

import os
import sys
from pathlib import Path

from experiments.vlm.world.shards import write_shard


def main(name: str, seed: str, folder: str, *shards: str) -> None:
    """Draw shards of a world's split into the folder, until the process that asked has ended."""
    parent = os.getppid()
    for shard in shards:
        if os.getppid() != parent:
            sys.exit("the process that asked for these shards has ended")
        write_shard(name, int(seed), Path(folder), int(shard))


if __name__ == "__main__":
    main(*sys.argv[1:])
