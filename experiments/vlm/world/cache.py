"""Where the embedded worlds lie: drawn on first use, once for all processes, then only read.

    CACHE/embedded/VERSION-seed0/sees/train/train-00000.tar ...

A changed generator draws into a new folder, since a change of what is drawn changes VERSION (a test holds the
two together). One process holds the lock and draws, the others wait for it. The folder appears under its name
when it is complete.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from experiments.vlm.cache_folder import cache_folder
from experiments.vlm.world.shards import SPLITS, WORLDS
from torchtitan.config.devices import available_cores
from torchtitan.config.errors import ConfigError
from torchtitan.tools.lock import wait_for_lock
from torchtitan.tools.logging import logger

REPOSITORY = Path(__file__).parents[3]
VERSION = "5b20e8f41c"  # of what is drawn: any other letters after a change


def ensure(name: str, cache: str = "", seed: int = 0) -> Path:
    """Folder of a world's split ("sees/train"), drawn if it is not there yet. `cache`: see `cache_folder`."""
    world, _, split = name.partition("/")
    if world not in WORLDS or split not in SPLITS:
        known = ", ".join(f"{world}/{split}" for world in WORLDS for split in SPLITS)
        raise ConfigError(f"embedded:{name} does not exist; there are {known}")
    folder = cache_folder(cache).absolute() / "embedded" / f"{VERSION}-seed{seed}" / name
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with wait_for_lock(folder.with_name(f"{split}.lock")):
                if not folder.is_dir():
                    _draw(name, seed, folder)
        except OSError as error:
            raise ConfigError(
                f"cannot draw embedded:{name} into {folder}: {error}; choose another data.cache_folder"
            ) from error
    return folder


def _draw(name: str, seed: int, folder: Path) -> None:
    prefix = f".unfinished-{folder.name}-"
    for left_over in folder.parent.glob(f"{prefix}*"):  # of a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    unfinished.chmod(0o755)
    start = time.monotonic()
    logger.info(f"drawing embedded:{name} into {folder} (once)")
    world, split = name.split("/")
    shards = len(WORLDS[world].shards(split))
    run_workers([name, str(seed), str(unfinished)], shards, unfinished)
    unfinished.rename(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*")) / 2**20
    logger.info(
        f"drew embedded:{name}: {WORLDS[world].samples[split]} samples, {size:.0f} MiB, "
        f"{time.monotonic() - start:.0f} s"
    )


def run_workers(arguments: list[str], shards: int, folder: Path) -> None:
    """One process a core, each with its share of the shards.

    Fresh interpreters: a fork of a trainer with running threads may hang, and spawned ones would import its
    main module.
    """
    processes = min(available_cores(), shards)
    running = []
    for first in range(processes):
        share = [str(shard) for shard in range(first, shards, processes)]
        command = [sys.executable, "-m", "experiments.vlm.world", *arguments, *share]
        running.append(subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True))
    try:
        with tqdm(desc="drawing", total=shards, unit="shard", disable=None) as bar:  # None: where no terminal
            while any(worker.poll() is None for worker in running):
                if any(worker.returncode for worker in running):
                    break
                time.sleep(0.05)
                bar.update(_finished(folder) - bar.n)
            bar.update(_finished(folder) - bar.n)
        for worker in running:
            if worker.poll():
                told = worker.stderr.read() if worker.stderr else ""
                if system := re.search(r"^OSError: \[Errno (\d+)\] (.*)\Z", told.rstrip(), re.M):
                    raise OSError(int(system[1]), system[2])
                raise RuntimeError(f"drawing {arguments[0]} failed:\n{told}")
    finally:
        for worker in running:
            worker.kill()
            worker.communicate()


def _finished(folder: Path) -> int:
    return sum(file.is_file() and not file.name.endswith(".unfinished") for file in folder.iterdir())
