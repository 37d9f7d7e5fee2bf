"""A job that is wrong by its options alone, and what is told of it."""

import pytest

from experiments.__main__ import checked_job
from torchtitan.config.errors import ConfigError

DATA = ["--training.dataset", "cc12m", "--training.dataset_path", "embedded:captions/train"]
P, C = "--parallelism.", "--checkpoint."
TP2, CP2, PP2 = (
    [P + name, "2"]
    for name in ("tensor_parallel_degree", "context_parallel_degree", "pipeline_parallel_degree")
)
FLAVOR_1B = ["--model.flavor", "so400m-llama3.2-1B"]
ZERO_BUBBLE = [*PP2, *FLAVOR_1B, P + "pipeline_parallel_schedule", "ZBVZeroBubble"]


def told(argv: list[str], world_size: int = 1) -> str:
    """The one line of its error."""
    with pytest.raises(ConfigError) as caught:
        checked_job(argv, world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message
