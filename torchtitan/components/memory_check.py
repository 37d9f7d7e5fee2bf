"""Whether a job fits this machine, checked before it gets storage: by what a rank holds in any case.

That is weights, gradients and optimizer state, all of which exist when the optimizer steps. Activations come
on top.
"""

from typing import Any

import torch

from torchtitan.components.optimizer import moments, trainable
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import JobConfig
from torchtitan.config.layout import Degrees
from torchtitan.tools.hardware import GIB, memory_gib
from torchtitan.tools.logging import warn_once

NEAR = 0.8  # share of the memory from which on activations may find no room


def held_gib(model: Any, job: JobConfig, layout: Degrees) -> float:
    """GiB of a rank, as a mean over ranks.

    `model`: the whole Model (spec.py), on the meta device, frozen where it is to be.
    """
    parameters = list(model.parameters())
    # and gradients
    weights = sum(parameter.numel() * (1 + parameter.requires_grad) for parameter in parameters)
    shards = layout.dp_shard * layout.cp * layout.tp * layout.pp
    by_rows = model.TOKEN_TABLES if job.training.trainable_tokens else ()
    state = moments(trainable(model), job.optimizer, model.ADAMW_ONLY, by_rows)
    return (weights + state) * torch.float32.itemsize / shards / GIB


def require_room(held: float, job: JobConfig, device: torch.device) -> None:
    """`held`: GiB of a rank, from `held_gib`.

    Raises ConfigError where that is more than there is; warns where it is most of it.
    """
    offload = job.training.enable_cpu_offload
    there = memory_gib(torch.device("cpu") if offload else device)
    what = "of host memory" if offload or device.type == "cpu" else "of GPU memory"
    state = f"weights, gradients and {job.optimizer.name} state"
    need = f"{state} take {held:.1f} GiB a rank, and a rank has {there:.1f} GiB {what}"
    if held > there:
        raise ConfigError(
            f"{job.model.label} does not fit this machine: {need}; "
            f"take a smaller flavor, freeze parts (training.freeze), or share it among more processes"
        )
    if held > NEAR * there:
        peak = "DRY_RUN=1 shows the peak with activations"
        warn_once(f"{job.model.label} nearly fills this machine: {need}; {peak}")
