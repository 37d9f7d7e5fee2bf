"""The weights of a run's last step as a Hugging Face folder, which all ranks write together."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from torchtitan.components.checkpoint_folder import INCOMPLETE
from torchtitan.config.errors import CheckpointError, UserError
from torchtitan.distributed.collectives import any_rank, from_first_rank
from torchtitan.tools.logging import logger

FOLDER = "hf"  # below the dump folder: hf/step-N, each complete once it has that name


def save_in_hf(write: Callable[[Path, int, int], object], folder: Path) -> None:
    """`write(into, rank, ranks)` the share of each rank, then give the folder its name.

    Called by all ranks alike. Raises CheckpointError on all where one of them fails.
    """
    half, wrong = folder.with_name(folder.name + INCOMPLETE), ""
    from_first_rank(lambda: _empty(half))
    try:
        write(half, dist.get_rank(), dist.get_world_size())
    except (OSError, UserError) as error:
        wrong = str(error)
    if any_rank(bool(wrong)):
        raise CheckpointError(
            f"{folder} was not written ({wrong or 'see another rank'}); the checkpoint is there: write it "
            "with `torchtitan-vlm to_hf`"
        )
    from_first_rank(lambda: _name(half, folder))
    logger.info(f"the weights as a Hugging Face folder: {folder}")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _name(half: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)
