"""The folder of what can be made again: embedded worlds, copies of shards, row groups, fetched images."""

import os
from pathlib import Path


def cache_folder(option: str) -> Path:
    """`option`: data.cache_folder. Empty: torchtitan-vlm in $XDG_CACHE_HOME, else in ~/.cache."""
    if option:
        return Path(option).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torchtitan-vlm"
