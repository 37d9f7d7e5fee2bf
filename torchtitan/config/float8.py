"""Whether a job can compute in fp8 ([float8]), by its options and by what is installed. Imports no torch.

What needs the device or the model is asked in components/float8.py.
"""

import importlib.util
from dataclasses import dataclass

from torchtitan.config.errors import require
from torchtitan.config.job import JobConfig

MULTIPLE = 16  # of all sizes of a product, which fp8 kernels ask for


@dataclass(frozen=True)
class Share:
    """What one rank has of the products of a part of the model."""

    rows: int  # of a forward: tokens or patches
    ranks: int = 1  # that divide each matrix


def check_float8(job: JobConfig) -> None:
    """Raises ConfigError for what cannot run, and for what has not been shown to be right."""
    options, p = job.float8, job.parallelism
    require(options.enable or not options.emulate, "float8.emulate needs float8.enable")
    if not options.enable:
        return
    check_torchao(job)
    dtype = job.training.mixed_precision_param
    require(
        options.emulate or dtype == "bfloat16",
        f"float8.enable needs training.mixed_precision_param = bfloat16, not {dtype}: fp8 products are "
        "rounded to it",
    )
    schedule = p.pipeline_parallel_schedule
    zero_bubble = p.pipeline_parallel_degree > 1 and schedule.endswith("ZeroBubble")
    for key, used in {
        "compile.cuda_graphs": job.compile.cuda_graphs,
        "parallelism.enable_async_tensor_parallel": p.enable_async_tensor_parallel,
        f"parallelism.pipeline_parallel_schedule = {schedule}": zero_bubble,
    }.items():
        require(not used, f"float8.enable has not been shown to be right with {key}: leave one out")


def check_torchao(job: JobConfig) -> None:
    """Raises ConfigError where fp8 is asked for and torchao is missing."""
    require(
        not job.float8.enable or importlib.util.find_spec("torchao") is not None,
        "float8.enable needs the package torchao: pip install 'torchtitan-vlm[fp8]'",
    )
