"""How often each source of data was delivered, by all ranks together, and a line when it begins anew.

One epoch is over when as much as the source holds was delivered; some of it may then have come twice and some
not at all, since slots go on by themselves.
"""

import math
from collections.abc import Mapping, Sequence

from torchtitan.tools.logging import logger

ROUNDING = 1e-6  # shares are added up in floating point


class Epochs:
    """How often each source was delivered, and which epochs are not logged yet."""

    def __init__(self, sources: Sequence[str], resumed: bool):
        """`resumed`: which epoch each source is in shows with the first step."""
        self.values = dict.fromkeys(sources, 0.0)
        # the latest epoch of each source that needs no line
        self.logged = {} if resumed else dict.fromkeys(sources, 1)
        # source -> (an epoch not logged yet, the step it began in)
        self.began: dict[str, tuple[int, int]] = {}

    @property
    def names(self) -> dict[str, str]:
        """Source -> the name that its epochs bear among a step's counts, and in the metrics."""
        return {source: f"epochs/{source}" for source in self.values}

    def add(self, step: int, total: Mapping[str, float]) -> None:
        """`total`: of a step, over all ranks."""
        self.values = {source: total[name] for source, name in self.names.items()}
        for source, value in self.values.items():
            present = max(1, math.ceil(value - ROUNDING))
            if present > max(self.logged.setdefault(source, present), self.began.get(source, (0, 0))[0]):
                self.began[source] = present, step

    def log(self) -> None:
        """A line for each source that began anew since the last call: a small one may do so in every step."""
        for source, (epoch, step) in self.began.items():
            logger.info(f"source {source}: epoch {epoch} began in step {step}")
            self.logged[source] = epoch
        self.began = {}

    def metrics(self) -> dict[str, float]:
        """The value of each source under its name in the metrics."""
        return {name: self.values[source] for source, name in self.names.items()}
